"""Training from stored targets against training with the teacher in the loop, on the bundled teacher and decoder.

Each stage is trained twice by the same loop from the same start: from a target store, and with an objective that knows
nothing of stores: it runs the teacher on each sample of the batch, unpadded, with eager attention and whole
vocabularies, takes the student's maps from eager attention too, and computes the dense definitions. What two runs
from the store differ by that cut their batches otherwise shows how much is rounding.

    python -m benchmarks.cached_against_online
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

from benchmarks.results import RESULTS, command_line, save_result
from pipeline.demo.assets import STUDENT_LM, TEACHER
from pipeline.demo.scenes.dataset import write_dataset
from pipeline.extraction.shard_extractor import ShardExtractor
from pipeline.run_file import load_run_file
from pipeline.training import train
from stages.samples.pack import PackConfig, pack_samples
from stages.student.data.batch import Batch
from stages.student.losses.attention import attention_alignment_loss
from stages.student.losses.logits import logit_distillation_loss
from stages.student.stage_config import StageName
from stages.student.training.objective import BatchTotals, DistillationObjective
from stages.teacher.config import TeacherConfig
from stages.teacher.identity import identify_teacher
from storage.codecs.windows import window_means, window_rows
from storage.samples.index import SampleIndex
from storage.stores import open_store
from storage.targets.manifest import create_or_check

STORES: dict[str, dict[str, Any]] = {
    "16 bits": {"map_codec": "float16", "logit_codec": "float16", "top_k": 10_000},
    "default": {},
    "4 bits": {"map_codec": "sqrt4"},
}
"""Codes of the stores: float16 and the whole vocabulary, the default (maps of 36 image tokens in 8 bits), and maps as
those of many image tokens are stored."""
CODED = ("default", "4 bits")
LAYERS, NUM_MATCHED = (2, 3, 4, 5, 6), 2
LEARNING_RATE = 1e-3
"""Five times the published one."""


class Kept(DistillationObjective):
    """The objective of training, which keeps the trained parameters as they were at the start."""

    made: ClassVar[list["Kept"]] = []

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.start = self.trained()
        self.made.append(self)

    def trained(self) -> dict[str, Tensor]:
        """What learns, as it is now."""
        return {name: p.detach().clone() for name, p in self.student.named_parameters() if p.requires_grad}


class Online(Kept):
    """The same losses by the textbook, with the teacher in the loop and one sample at a time."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        load = AutoModelForImageTextToText.from_pretrained
        # In a list: no part of this module, so that it is neither trained nor saved.
        self.teacher = [load(TEACHER, dtype=torch.float32, attn_implementation="eager").eval()]

    def forward(self, batch: Batch, totals: BatchTotals) -> tuple[Tensor, dict[str, Tensor]]:
        """As the objective of training; nothing that is stored of the teacher is looked at."""
        self.student.set_attn_implementation("eager")
        terms = {name: torch.zeros(()) for name, weight in self.weights.items() if name == "lm" or weight > 0}
        images = iter(batch.inputs.get("pixel_values", torch.zeros(0)))
        for row, positions in enumerate(batch.image_positions):
            ids = batch.inputs["input_ids"][row][batch.inputs["attention_mask"][row].bool()]
            pixels = {"pixel_values": next(images)[None]} if len(positions) else {}
            of_row = batch.answers.sequence_R == row
            rows, answers = batch.answers.position_R[of_row], batch.answers.token_R[of_row]
            self._add(terms, {"input_ids": ids[None], **pixels}, rows, answers, positions, totals)
        loss = torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()
        return loss, {name: value.detach() for name, value in terms.items()}

    def _add(
        self,
        terms: dict[str, Tensor],
        inputs: dict[str, Tensor],
        rows: Tensor,
        answers: Tensor,
        positions: Tensor,
        totals: BatchTotals,
    ) -> None:
        with torch.no_grad():
            seen = self.teacher[0](**inputs, output_attentions=True)
        own = self.student(**inputs, output_attentions=True)
        logits_RV = own.logits[0, rows]
        terms["lm"] = terms["lm"] + F.cross_entropy(logits_RV, answers, reduction="sum") / totals.answer_rows
        if "kd" in terms:
            mean = logit_distillation_loss(logits_RV, seen.logits[0, rows])
            terms["kd"] = terms["kd"] + mean * len(rows) / totals.answer_rows
        if self.matching is None or not len(positions):
            return
        maps = [
            torch.stack([attentions[layer][0].mean(0)[positions][:, positions] for layer in layers])
            for attentions, layers in ((own.attentions, self.matching.student_layers), (seen.attentions, LAYERS))
        ]
        windows = window_means(maps[1], window_rows(LAYERS, self.matching.windows))
        loss = attention_alignment_loss(maps[0][:, None], windows[:, None])
        terms["attention"] = terms["attention"] + loss / totals.samples_with_image


class Bench:
    """Scenes, packed and extracted.

    Args:
        folder: everything is made here.
        images: how many scenes; about two conversations each.
        stores: which of `STORES`.
    """

    def __init__(self, folder: Path, images: int, stores: Sequence[str]) -> None:
        self.folder = folder
        write_dataset(folder / "data", images, seed=0, num_pairs=1)
        pack_samples(folder / "data/train.json", folder / "data", folder / "samples", PackConfig())
        for name in stores:
            settings = {"layers": LAYERS, "num_matched": NUM_MATCHED, "max_length": 512, **STORES[name]}
            self._extract(TeacherConfig(checkpoint=str(TEACHER), **settings), folder / name)

    def _extract(self, settings: TeacherConfig, out: Path) -> None:
        samples = self.folder / "samples"
        index = SampleIndex.load(open_store(samples))
        manifest = identify_teacher(settings, on_gpu=False).manifest(index.digest, len(index.shards))
        create_or_check(open_store(out), manifest)
        worker = ShardExtractor(settings, str(samples), str(out), manifest, torch.get_num_threads())
        for shard in range(len(index.shards)):
            worker(shard, lambda _: None)
        worker.observer.close()

    def train(
        self, stage: StageName, steps: int, store: str, objective: type[Kept], microbatch_size: int = 16
    ) -> "Trained":
        """One stage from the bare decoder, in batches of 16."""
        with tempfile.TemporaryDirectory(dir=self.folder) as output:
            settings = [
                f"train.loader.microbatch_size={microbatch_size}",
                "train.loader.num_workers=0",
                "train.logging.every=1",
                "train.logging.trackers=[]",
                "train.lora={rank: 16, alpha: 32}",
                f"train.{stage}={{batch_size: 16, epochs: 50, max_steps: {steps}, learning_rate: {LEARNING_RATE}}}",
            ]
            places = {"samples": self.folder / "samples", "targets": self.folder / store, "student": STUDENT_LM}
            run = load_run_file(None, settings, {name: str(p) for name, p in {**places, "output": output}.items()})
            train(run, [stage], objective=objective)
            lines = (Path(output) / stage / "metrics.jsonl").read_text().splitlines()
        return Trained([json.loads(line) for line in lines], objective.made.pop())


class Trained:
    """What a run left: a line of metrics for each step, and what it trained."""

    def __init__(self, steps: list[dict[str, float]], objective: Kept) -> None:
        self.steps, self.start, self.end = steps, objective.start, objective.trained()
        self.terms = [name for name in ("loss", "lm", "kd", "attention") if name in steps[0]]

    def against(self, other: "Trained") -> dict[str, Any]:
        """Differences from another run: of each term, relative, of the first step and of the step where it is largest;
        of the weights, as a share of the way that training moved them.
        """
        assert len(self.steps) == len(other.steps)
        terms = {}
        for name in self.terms:
            relative = [abs(a[name] / b[name] - 1) for a, b in zip(self.steps, other.steps, strict=True)]
            terms[name] = {"first_step": relative[0], "largest": max(relative), "last_step": relative[-1]}
        apart, moved = (
            sum(float((a[name] - b[name]).square().sum()) for name in a) ** 0.5
            for a, b in ((self.end, other.end), (other.start, other.end))
        )
        return {"terms": terms, "weights_apart_of_way_moved": apart / moved}


def measure(stage: StageName, steps: int, bench: Bench) -> dict[str, Any]:
    """All comparisons of one stage."""
    online = bench.train(stage, steps, "16 bits", Online)
    exact = bench.train(stage, steps, "16 bits", Kept)
    return {
        "online": {
            "first": {name: online.steps[0][name] for name in online.terms},
            "last": {name: online.steps[-1][name] for name in online.terms},
        },
        "16 bits against online": exact.against(online),
        **{f"{name} against online": bench.train(stage, steps, name, Kept).against(online) for name in CODED},
        "16 bits in microbatches of 4 against 16": bench.train(stage, steps, "16 bits", Kept, 4).against(exact),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=RESULTS / "cached_against_online.json")
    flags = parser.parse_args()
    stages: tuple[StageName, ...] = ("dpt", "dft", "sft")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), flags.images, list(STORES))
        found = {stage: measure(stage, flags.steps, bench) for stage in stages}
    result = {"images": flags.images, "steps": flags.steps, "stores": STORES, "stages": found}
    save_result(flags.out, torch.device("cpu"), command_line("benchmarks.cached_against_online"), result)
    print(flags.out.read_text())


if __name__ == "__main__":
    main()
