"""One optimizer step of the real training loop, whose gradients are kept; alone or as a process of torchrun.

    python -m tests.stages.student.one_step FOLDER MICROBATCH_SIZE PARALLEL NUM_SAMPLES

FOLDER holds `samples`, `targets` and `lm`, and may hold settings of the stage in `stage.json`. The gradients go to a
folder in it, see `step_folder`.
"""

import json
import sys
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from stages.student.data.batch import Batch
from stages.student.data.config import LoaderConfig
from stages.student.losses.head import answer_losses
from stages.student.stage_config import DistilledFinetuning
from stages.student.training.loop import train_stage
from stages.student.training.objective import DistillationObjective
from stages.student.training.parallel import gathered
from stages.student.training.stage_run import StageRun
from stages.student.training.train_config import LoggingConfig, ParallelConfig, Strategy, TrainConfig
from storage.samples.sample_set import SampleSet
from storage.streaming.stream import Source
from storage.targets.store import TargetStore

BATCH_SIZE = 16
LOGITS_AT_ONCE = 10_000
"""Some 25 answer rows, so that each microbatch has several parts."""


def step_folder(folder: Path, num_ranks: int, microbatch_size: int, parallel: str, num_samples: int) -> Path:
    """Where a step leaves what it found."""
    return folder / f"step-{parallel}-{num_ranks}x{microbatch_size}-{num_samples}"


def take_step(folder: Path, microbatch_size: int, strategy: Strategy = "ddp", num_samples: int = BATCH_SIZE) -> Path:
    """Trains one step; returns the folder with what it left.

    `gradients.safetensors` and `metrics.jsonl` of the global batch, `rank-N.json` with the answer rows and the samples
    with an image of each of that rank's microbatches.
    """
    accelerator = Accelerator(cpu=True)
    output = step_folder(folder, accelerator.num_processes, microbatch_size, strategy, num_samples)
    # No step is clipped, or the gradients would say nothing of their length.
    stage = {"batch_size": BATCH_SIZE, "trains": "full", "max_steps": 1, "max_samples": num_samples}
    if (folder / "stage.json").exists():
        stage |= json.loads((folder / "stage.json").read_text())
    config = TrainConfig(
        dft=DistilledFinetuning.model_validate(stage),
        max_grad_norm=1e9,
        loader=LoaderConfig(microbatch_size=microbatch_size, num_workers=0),
        parallel=ParallelConfig(strategy=strategy),
        logging=LoggingConfig(trackers=()),
    )
    source = Source(SampleSet.open(folder / "samples"), TargetStore.open(folder / "targets"))
    run = StageRun("dft", config, str(folder / "lm"), None, (source,), output)
    counts: list[tuple[int, int]] = []
    forward, step = DistillationObjective.forward, torch.optim.AdamW.step

    def counted(self: DistillationObjective, batch: Batch, totals: Any) -> Any:
        counts.append((len(batch.answers), batch.num_with_image))
        return forward(self, batch, totals)

    def kept(self: torch.optim.AdamW, *arguments: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        named = gathered({f"{number:04}": g for number, g in enumerate(gradients) if g is not None}, wanted=True)
        if accelerator.is_main_process:
            save_file(named, output / "gradients.safetensors")
        return step(self, *arguments)

    with (
        patch.object(DistillationObjective, "forward", counted),
        patch.object(torch.optim.AdamW, "step", kept),
        patch.dict(answer_losses.__kwdefaults__, logits_at_once=LOGITS_AT_ONCE),
    ):
        train_stage(run, accelerator)
    (output / f"rank-{accelerator.process_index}.json").write_text(json.dumps(counts))
    return output


if __name__ == "__main__":
    torch.set_num_threads(1)
    take_step(Path(sys.argv[1]), int(sys.argv[2]), cast("Strategy", sys.argv[3]), int(sys.argv[4]))
