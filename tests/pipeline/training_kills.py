"""Training in processes that die by SIGKILL at random moments, each followed by the same command again."""

import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.training import train
from stages.student.stage_config import STAGES, StageName
from tests.pipeline.forks import Forked
from tests.pipeline.runs import TrainingData, run_file
from tests.processes import is_alive

MOST_LIVES_A_KILL = 4
DELAYS_S = (0.02, 0.1, 0.5)
"""At most so long from a chosen step to the kill: within it, in those after it, in loading and saving."""


@dataclass
class TrainingTally:
    """What a campaign did."""

    kills: dict[str, int] = field(default_factory=dict)
    """Stage -> lives that were killed in it."""
    killed_after: dict[str, list[int]] = field(default_factory=dict)
    """Stage -> for each kill, the steps that were done by then, those of earlier lives included."""
    came_through: int = 0
    """Lives that ended by themselves; the weights of each were compared to the bit."""


def weights(run: Path, stage: str) -> bytes:
    return (run / stage / "student" / "model.safetensors").read_bytes()


def kill_stages(
    tiny: TrainingData, targets: Path, undisturbed: Path, scratch: Path, *, seed: int, num_kills: int
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
        num_steps = _steps_done(undisturbed, stage)
        num_lives = 0
        output = _begin(undisturbed, scratch, stage)
        while tally.kills[stage] < num_kills:
            num_lives += 1
            assert num_lives < MOST_LIVES_A_KILL * num_kills, "lives make no progress"
            life = train_in_fork(tiny, targets, output, [stage])
            wanted = rng.randint(0, num_steps)
            while is_alive(life.pid) and _steps_done(output, stage) < wanted:
                time.sleep(0.002)
            life.kill_after(rng.uniform(0, rng.choice(DELAYS_S)))
            if life.end().killed:
                tally.kills[stage] += 1
                tally.killed_after[stage].append(_steps_done(output, stage))
                if _steps_done(output, stage) < num_steps:
                    continue
                # Only saving is left, in which all further kills would fall.
                assert not train_in_fork(tiny, targets, output, [stage]).end().killed
            _compare(tally, output, undisturbed, stage, seed)
            output = _begin(undisturbed, scratch, stage)
        assert not train_in_fork(tiny, targets, output, [stage]).end().killed
        _compare(tally, output, undisturbed, stage, seed)
    return tally


def _steps_done(output: Path, stage: StageName) -> int:
    metrics = output / stage / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.is_file() else 0


def _begin(undisturbed: Path, scratch: Path, stage: StageName) -> Path:
    """A run folder with the stages before this one finished."""
    output = scratch / "run"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    for before in STAGES[: STAGES.index(stage)]:
        shutil.copytree(undisturbed / before, output / before)
    return output


def train_in_fork(tiny: TrainingData, targets: Path, output: Path, stages: Sequence[StageName]) -> Forked:
    """A child of this process that trains these stages."""

    def live(_: Callable[[str], None]) -> None:
        train(run_file(tiny, targets, output), stages)

    return Forked(live)


def _compare(tally: TrainingTally, output: Path, undisturbed: Path, stage: StageName, seed: int) -> None:
    assert weights(output, stage) == weights(undisturbed, stage), f"seed {seed}: {stage} ended with other weights"
    left = [path.name for path in (output / stage).rglob("*.partial")]
    assert not left, f"seed {seed}: {stage} left {left}"
    tally.came_through += 1
