"""How far a saved student is from the one that was trained in bfloat16, on the bundled teacher and decoder.

While a stage trains in bfloat16 (`train.parallel.precision`), what is frozen is rounded to it and the forward pass
computes in it; what is saved are the unrounded weights with the updates added, in float32. Compared are the logits of
answer rows: of the student in memory after the last step, as training runs it, and of the saved one in float32. For
scale: the saved one loaded and run in bfloat16, and the student that the stage began from.

    python -m benchmarks.saved_student
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.cached_against_online import Bench
from benchmarks.results import RESULTS, command_line, save_result
from pipeline.demo.assets import STUDENT_LM
from pipeline.run_file import load_run_file
from pipeline.training import train
from stages.student.data.batch import Batch
from stages.student.data.collator import Collator
from stages.student.data.sample_reader import resolve_reader_spec
from stages.student.model.loading import load_student
from stages.student.model.student import Student
from stages.student.stage_config import StageName
from stages.student.training.objective import DistillationObjective
from storage.samples.sample_set import SampleSet
from storage.streaming.stream import Mixture, Source, StreamConfig, mixture_stream
from storage.targets.store import TargetStore

BEFORE: dict[StageName, StageName | None] = {"dpt": None, "dft": "dpt", "sft": "dft"}


class Kept(DistillationObjective):
    """The objective of training, which can be asked for the student afterwards."""

    made: ClassVar[list["Kept"]] = []

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.made.append(self)


def answer_logits(student: Student, batch: Batch, *, as_trained: bool = False) -> Tensor:
    """`[R, V]` float32 of a batch's answer rows, in the student's precision or, `as_trained`, as the training loop."""
    student.eval()
    batch = batch.to(torch.device("cpu"), student.dtype)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=as_trained):
        hidden_BTd = student.model(**batch.inputs, use_cache=False).last_hidden_state
        logits_RV: Tensor = student.lm_head(hidden_BTd[batch.answers.sequence_R, batch.answers.position_R])
    return logits_RV.float()


def against(found_RV: Tensor, saved_RV: Tensor) -> dict[str, float]:
    """What the logits of the saved student differ by."""
    logprobs_RV, saved_logprobs_RV = found_RV.log_softmax(-1), saved_RV.log_softmax(-1)
    return {
        "largest_difference": float((found_RV - saved_RV).abs().max()),
        "kl_nats": float((saved_logprobs_RV.exp() * (saved_logprobs_RV - logprobs_RV)).sum(-1).mean()),
        "other_most_likely_token": float((found_RV.argmax(-1) != saved_RV.argmax(-1)).float().mean()),
    }


def measure(bench: Bench, output: Path, steps: int, num_samples: int) -> dict[StageName, Any]:
    """The three stages in a row, in bfloat16."""
    store = TargetStore.open(str(bench.folder / "4 bits"))
    samples = SampleSet.open(bench.folder / "samples")
    mixture = Mixture([Source(samples, store)], StreamConfig(seed=1, batch_size=num_samples))
    stream = mixture_stream(mixture, rank=0, world_size=1, epochs=range(1))
    spec = resolve_reader_spec(store, STUDENT_LM, own_vision=False, kd_weight=1.0)
    batch = Collator(spec.reader)(next(iter(stream)))
    settings = [
        "train.parallel.precision=bf16",
        "train.loader.microbatch_size=16",
        "train.loader.num_workers=0",
        "train.logging.trackers=[]",
    ]
    settings += ["train.lora={rank: 16, alpha: 32}"]
    stage = f"{{batch_size: 16, epochs: 50, max_steps: {steps}, learning_rate: 1.0e-3}}"
    settings += [f"train.{name}={stage}" for name in BEFORE]
    places = {
        "samples": samples.store.url,
        "targets": store.store.url,
        "student": str(STUDENT_LM),
        "output": str(output),
    }
    run = load_run_file(None, settings, places)
    found: dict[StageName, Any] = {}
    for name, before in BEFORE.items():
        train(run, [name], objective=Kept)
        trained = Kept.made.pop().student
        folder = output / name / "student"
        saved_RV = answer_logits(load_student(folder), batch)
        ways = {
            "as trained": answer_logits(trained, batch, as_trained=True),
            "saved, in bfloat16": answer_logits(load_student(folder, torch.bfloat16), batch),
        }
        if before is not None:
            ways[f"{before}, that it began from"] = answer_logits(load_student(output / before / "student"), batch)
        found[name] = {
            "answer_rows": len(saved_RV),
            "largest_logit": float(saved_RV.abs().max()),
            **{way: against(logits_RV, saved_RV) for way, logits_RV in ways.items()},
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=128, help="On which logits are compared.")
    parser.add_argument("--out", type=Path, default=RESULTS / "saved_student.json")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), flags.images, ["4 bits"])
        found = measure(bench, Path(folder) / "run", flags.steps, flags.samples)
    result = {"images": flags.images, "steps": flags.steps, "samples": flags.samples, "stages": found}
    save_result(flags.out, torch.device("cpu"), command_line("benchmarks.saved_student"), result)
    print(flags.out.read_text())


if __name__ == "__main__":
    main()
