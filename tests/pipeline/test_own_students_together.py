"""Students with their own vision tower in several processes: same result as in one, also without an image in one."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.checkpoints import make_tiny_llava
from tests.conftest import TinyWorld
from tests.pipeline.runs import TrainingData, dealt
from tests.pipeline.test_distributed import ONE, PATIENCE_S, TORCHRUN, assert_same_training, trained
from tests.stages.distilled import TinyData
from tests.stages.extracted_families import extract_family, make_samples
from tests.tiny_families import make_tiny_family

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * PATIENCE_S)]

SEED = 1
SETTINGS = (
    "train.vision=own",
    f"train.seed={SEED}",
    "train.loader.microbatch_size=1",
    # A sample a process, then two of them one after another: of each step, the longest first, text at its end.
    "train.dpt={batch_size: 2}",
    "train.dft={batch_size: 4, epochs: 3, max_steps: 6, learning_rate: 1.0e-3}",
    "train.sft={batch_size: 3}",
)


@dataclass(frozen=True)
class World:
    """A student with its own vision tower, what it is trained on, and what one process made of it."""

    data: TrainingData
    targets: Path
    alone: Path


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def world(
    request: pytest.FixtureRequest, tiny: TinyWorld, targets: Path, tmp_path_factory: pytest.TempPathFactory
) -> World:
    folder = tmp_path_factory.mktemp("own-together")
    if request.param == "llava":
        student = make_tiny_llava(folder / "student", num_layers=5, hidden=16, seed=9)
        data = TinyData(tiny.teacher, student, tiny.samples)
    else:
        extracted = extract_family(request.param, make_samples(folder), folder)
        student = make_tiny_family(folder / "student", request.param, seed=7)
        data, targets = TinyData(extracted.checkpoint, student, extracted.samples), folder / "targets"
    return World(data, targets, trained(ONE, data, targets, folder / "alone", *SETTINGS))


@pytest.mark.parametrize("batch_size", [2, 4])
def test_in_some_microbatches_one_of_two_processes_has_text_only(batch_size: int, world: World) -> None:
    ranks = [dealt(world.data.samples, world.targets, batch_size, rank, SEED) for rank in (0, 1)]
    pairs = [[[bool(sample.images) for sample in samples] for samples in pair] for pair in zip(*ranks, strict=True)]
    assert [[True], [False]] in pairs


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_give_the_losses_and_weights_of_one(parallel: str, world: World, tmp_path: Path) -> None:
    run = trained(
        TORCHRUN, world.data, world.targets, tmp_path / "run", *SETTINGS, f"train.parallel.strategy={parallel}"
    )
    assert_same_training(run, world.alone)
