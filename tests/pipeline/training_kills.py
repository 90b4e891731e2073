"""Training in processes that die by SIGKILL at random moments, each followed by the same command again."""

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.training import STAGES, train
from stages.student.config import StageName
from tests.conftest import TinyWorld
from tests.pipeline.forks import Forked
from tests.pipeline.runs import run_file

MOST_LIVES_A_KILL = 4


@dataclass
class TrainingTally:
    """What a campaign did."""

    kills: dict[str, int] = field(default_factory=dict)
    """Stage -> lives that were killed in it."""
    killed_after: dict[str, list[int]] = field(default_factory=dict)
    """Stage -> for each kill, the step of the newest whole checkpoint at that time, 0 for none."""
    came_through: int = 0
    """Lives that ended by themselves; the weights of each were compared to the bit."""


def weights(run: Path, stage: str) -> bytes:
    return (run / stage / "student" / "model.safetensors").read_bytes()


def kill_stages(
    tiny: TinyWorld, targets: Path, undisturbed: Path, scratch: Path, *, seed: int, num_kills: int
) -> TrainingTally:
    """Kills each stage that many times; whenever a life comes through, its student is compared and trained anew.

    Args:
        tiny: models and samples.
        targets: of them.
        undisturbed: a run of `tests.pipeline.runs.SETTINGS`.
        scratch: folder for the runs.
        seed: of the moments.
        num_kills: in each stage.

    Raises:
        AssertionError: a stage did not end with the weights of the undisturbed run.
    """
    tally, rng = TrainingTally(), random.Random(seed)
    for stage in STAGES:
        tally.kills[stage], tally.killed_after[stage] = 0, []
        output = _begin(undisturbed, scratch, stage)
        started = time.monotonic()
        assert not _life(tiny, targets, output, stage).end().killed
        whole_s = time.monotonic() - started
        num_lives = 0
        output = _begin(undisturbed, scratch, stage)
        while tally.kills[stage] < num_kills:
            num_lives += 1
            assert num_lives < MOST_LIVES_A_KILL * num_kills, "lives make no progress"
            life = _life(tiny, targets, output, stage)
            life.kill_after(rng.uniform(0, whole_s))
            if life.end().killed:
                tally.kills[stage] += 1
                steps = [
                    int(path.name.split("-")[1]) for path in (output / stage / "checkpoints").glob("step-????????")
                ]
                tally.killed_after[stage].append(max(steps, default=0))
                continue
            _compare(tally, output, undisturbed, stage, seed)
            output = _begin(undisturbed, scratch, stage)
        assert not _life(tiny, targets, output, stage).end().killed
        _compare(tally, output, undisturbed, stage, seed)
    return tally


def _begin(undisturbed: Path, scratch: Path, stage: StageName) -> Path:
    """A run folder with the stages before this one finished."""
    output = scratch / "run"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    for before in STAGES[: STAGES.index(stage)]:
        shutil.copytree(undisturbed / before, output / before)
    return output


def _life(tiny: TinyWorld, targets: Path, output: Path, stage: StageName) -> Forked:
    def live(_: Callable[[str], None]) -> None:
        train(run_file(tiny, targets, output), [stage])

    return Forked(live)


def _compare(tally: TrainingTally, output: Path, undisturbed: Path, stage: StageName, seed: int) -> None:
    assert weights(output, stage) == weights(undisturbed, stage), f"seed {seed}: {stage} ended with other weights"
    left = [path.name for path in (output / stage).rglob("*.partial")]
    assert not left, f"seed {seed}: {stage} left {left}"
    tally.came_through += 1
