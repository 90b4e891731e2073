"""One tiny training run that several tests start, stop and compare."""

from pathlib import Path
from typing import Protocol

from pipeline.run_file import RunFile, load_run_file
from storage.streaming.stream import StreamConfig, StreamedSample
from tests.storage.builders import target_stream


class TrainingData(Protocol):
    """What a student is trained from, beside the targets."""

    @property
    def student_lm(self) -> Path: ...

    @property
    def samples(self) -> Path: ...


SETTINGS = (
    "train.loader.microbatch_size=4",
    "train.parallel.precision=fp32",
    "train.loader.num_workers=0",
    "train.checkpoint.every=2",
    "train.logging.every=1",
    "train.lora={rank: 4, alpha: 8, dropout: 0.1}",
    "train.dpt={batch_size: 4, max_steps: 5}",
    "train.dft={batch_size: 8, epochs: 2, max_steps: 5, learning_rate: 1.0e-3}",
    "train.sft={batch_size: 8, max_steps: 3}",
)
"""A few steps of each stage; dft crosses an epoch's end and accumulates."""


def run_file(tiny: TrainingData, targets: Path, output: Path, *settings: str) -> RunFile:
    places = {"samples": tiny.samples, "targets": targets, "student": tiny.student_lm, "output": output}
    return load_run_file(None, [*SETTINGS, *settings], {name: str(place) for name, place in places.items()})


def dealt(samples: Path, targets: Path, batch_size: int, rank: int, seed: int = 0) -> list[list[StreamedSample]]:
    """The microbatches that one of two processes gets in the first epoch, of one sample each."""
    config = StreamConfig(seed=seed, batch_size=batch_size, microbatch_size=1, bucket_by_length=True)
    return list(target_stream(samples, targets, config, rank=rank, world_size=2, epoch=0))
