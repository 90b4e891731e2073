"""A tiny teacher's targets made in this process, without Ray, for the tests of stages."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stages.samples.pack import PackConfig, pack_samples
from stages.teacher.config import TeacherConfig
from stages.teacher.observe import Observer, ShardObservations
from stages.teacher.teacher import Teacher, load_teacher
from storage.samples.image_settings import DEFAULT_IMAGES, ImageConfig
from storage.samples.sample_set import SampleSet
from storage.samples.shard_reader import SampleShard
from storage.stores import open_store
from storage.targets.manifest import create_or_check
from storage.targets.shard_writer import write_shard
from storage.targets.store import TargetStore
from storage.targets.teacher_assets import save_teacher
from tests.checkpoints import make_llava_data, make_tiny_llava, make_tiny_lm


@dataclass(frozen=True)
class TinyData:
    """Packed samples and the checkpoints that fit them."""

    teacher: Path
    student_lm: Path
    samples: Path


def make_tiny_data(folder: Path, num_samples: int = 20) -> TinyData:
    """A teacher of 8 layers, a student decoder of 6, and LLaVA conversations in shards of 8."""
    teacher = make_tiny_llava(folder / "teacher", num_layers=8)
    student = make_tiny_lm(folder / "lm", tokenizer_from=teacher, num_layers=6)
    source, images = make_llava_data(folder / "data", num_samples)
    pack_samples(source, images, folder / "samples", PackConfig(max_samples_per_shard=8))
    return TinyData(teacher, student, folder / "samples")


def extract_here(data: TinyData, out: Path, images: ImageConfig = DEFAULT_IMAGES, **settings: object) -> TargetStore:
    """Targets of all shards, made one after another."""
    teacher = load_teacher(TeacherConfig.model_validate({"checkpoint": str(data.teacher), **settings}), images)
    samples, targets = SampleSet.open(data.samples), open_store(out)
    index = samples.index
    manifest = teacher.identity.manifest(index.digest, len(index.shards))
    create_or_check(targets, manifest)
    staged = targets.staging("teacher")
    teacher.save_vision(staged)
    save_teacher(targets, manifest, staged)
    for number, entry in enumerate(index.shards):
        with samples.shard(number) as shard:
            seen = observe_shard(teacher, shard)
        write_shard(targets, number, manifest, entry.name, seen.samples, seen.maps, seen.skipped)
    return TargetStore.open(out)


def observe_shard(
    teacher: Teacher, shard: SampleShard, progress: Callable[[int], None] | None = None
) -> ShardObservations:
    """What a teacher says of one shard alone."""
    with Observer(teacher) as observer:
        return observer.observe(shard, progress)
