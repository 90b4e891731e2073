"""Data shared by all tests: a tiny teacher and student, packed samples, extracted targets, one Ray cluster.

Also which tests run in one process when pytest-xdist spreads them over several.
"""

import gc
import json
import os
import random
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pipeline.runtime.cpu_determinism import make_cpu_deterministic

# Hidden devices and one thread: the same bytes on any machine.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# As extraction does: a process that began before and one that began after would differ in the last bit.
make_cpu_deterministic()

pytest_plugins = ["tests.s3_server", "tests.faulty_s3", "tests.small_disk"]

EXPENSIVE = {
    "ray": r'usefixtures\("ray_address"\)',
    "run": r"\bundisturbed: Path",
    "families": r"\bextract: (Any|Callable\[)",
}
"""Groups of test files that share a session fixture worth making once: how a file of the group asks for it."""

BEGUN = time.monotonic()
NUM_SAMPLES = 24
SAMPLES_PER_SHARD = 4


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--begin-within", type=float, metavar="MINUTES", help="skip the tests that have not begun by then")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """For a machine with a time limit: what it left out stands in the summary, and what it ran can still fail."""
    minutes = item.config.getoption("--begin-within")
    if minutes is not None and time.monotonic() - BEGUN > 60 * minutes:
        pytest.skip(f"not begun within {minutes:g} minutes")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives each group of files, and every other file, to one worker as a whole."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(config.rootpath / nodeid.split("::")[0])

    return ByGroup(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the groups first, so that no worker is left alone with one in the end."""
    items.sort(key=lambda item: [*EXPENSIVE, str(item.path)].index(_group(item.path)))


@cache
def _group(file: Path) -> str:
    text = file.read_text()
    return next((group for group, asked in EXPENSIVE.items() if re.search(asked, text)), str(file))


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


@pytest.fixture(autouse=True)
def accelerate_forgets() -> Iterator[None]:
    """Accelerate keeps the precision of a process's first Accelerator for all later ones, of other tests too."""
    yield
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state()


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
    from pipeline.extraction.config import ExtractConfig
    from pipeline.extraction.extract import extract
    from stages.teacher.config import TeacherConfig
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
