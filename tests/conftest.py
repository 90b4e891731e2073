"""Data shared by all tests: a tiny teacher and student, packed samples, extracted targets, one Ray cluster.

Also which tests run in one process when pytest-xdist spreads them over several.
"""

import gc
import json
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.cpu_determinism import make_cpu_deterministic

# Hidden devices and one thread: the same bytes on any machine.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# As extraction does: a process that began before and one that began after would differ in the last bit.
make_cpu_deterministic()

pytest_plugins = ["tests.s3_server", "tests.faulty_s3", "tests.small_disk"]

EXPENSIVE = ("ray_address", "undisturbed", "extract")
"""Session fixtures that are made once, by the worker that runs all tests of them: a cluster, a training run, targets of
every family."""

NUM_SAMPLES = 24
SAMPLES_PER_SHARD = 4


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sends all tests of an expensive fixture to one worker, which begins with them, and every other file as a whole.

    Before pytest-xdist's own hook, which reads the groups.
    """
    items.sort(key=lambda item: (*EXPENSIVE, "").index(_expensive_fixture(item)))
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(_expensive_fixture(item) or item.path.as_posix()))


def pytest_collection_finish() -> None:
    """Makes whatever the tests do cheaper; nothing that a test sees."""
    # What imports and collection made lasts until the process ends; the collector need not look at it.
    gc.collect()
    gc.freeze()
    # The library spells out each config that it reads, against a new one of its class, for a message that nobody sees:
    # a third of the time in which it loads a tiny model.
    for name in ("PreTrainedConfig", "GenerationConfig"):
        if (library := sys.modules.get("transformers")) is not None:
            getattr(library, name).__repr__ = object.__repr__


def _expensive_fixture(item: pytest.Item) -> str:
    return next((name for name in EXPENSIVE if name in getattr(item, "fixturenames", ())), "")


@dataclass(frozen=True)
class TinyWorld:
    """Folders of one small data set and the models for it."""

    teacher: Path
    student_lm: Path
    data: Path
    images: Path
    samples: Path
    pairs: Path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """Made once; tests read it and write elsewhere."""
    from stages.samples.pack import PackConfig, pack_samples
    from tests.checkpoints import make_llava_data, make_tiny_llava, make_tiny_lm

    folder = tmp_path_factory.mktemp("tiny")
    teacher = make_tiny_llava(folder / "teacher", num_layers=8)
    student_lm = make_tiny_lm(folder / "student_lm", tokenizer_from=teacher)
    data, images = make_llava_data(folder / "data", NUM_SAMPLES)
    pack_samples(data, images, folder / "samples", PackConfig(max_samples_per_shard=SAMPLES_PER_SHARD))
    pairs = _make_pairs(folder / "pairs", 4)
    return TinyWorld(teacher, student_lm, data, images, folder / "samples", pairs)


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """Address of the one Ray cluster of the test session; this process is connected to it as well."""
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="session")
def targets(tiny: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target store of the tiny data, made in this process without Ray; tests read it and write elsewhere."""
    from pipeline.extraction import ExtractConfig, extract
    from stages.teacher.identity import TeacherConfig
    from tests.pipeline.in_process import without_ray

    folder = tmp_path_factory.mktemp("targets") / "store"
    teacher = TeacherConfig(checkpoint=str(tiny.teacher), batch_size=4)
    with without_ray():
        extract(teacher, str(tiny.samples), str(folder), ExtractConfig())
    return folder


def _make_pairs(folder: Path, num_pairs: int) -> Path:
    from tests.checkpoints import draw_random_image

    rng = random.Random(1)
    (folder / "images").mkdir(parents=True)
    for kind in ("replace_att", "swap_obj"):
        pairs = {}
        for number in range(num_pairs):
            name = f"{kind}-{number}.png"
            draw_random_image(rng).save(folder / "images" / name)
            pairs[str(number)] = {
                "filename": name,
                "caption": "A red square is left of a blue circle.",
                "negative_caption": "A blue circle is left of a red square.",
            }
        (folder / f"{kind}.json").write_text(json.dumps(pairs))
    return folder
