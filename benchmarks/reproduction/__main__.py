"""Checks a miniature world, then compares students in it; each step is kept, and a second call resumes.

python -m benchmarks.reproduction [world|teacher|attention|oracle|compare|explore] [--folder runs/reproduction]

Without a step, all of them.
"""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.reproduction import checks
from benchmarks.reproduction.arms import CLAIMED, EXPLORED
from benchmarks.reproduction.comparison import COMPARISON_SETTINGS, compared_run, run_name, summary, targets
from benchmarks.reproduction.kept_runs import Runs, kept, with_earlier
from benchmarks.reproduction.settings import STUDENT_SETTINGS, TEACHER_SETTINGS, WORLD_SETTINGS
from benchmarks.results import RESULTS, command_line, save_result

STEPS = ("world", "teacher", "attention", "oracle", "compare", "explore")
ORACLE_SETTINGS = {**WORLD_SETTINGS, **STUDENT_SETTINGS, "arms": checks.ORACLE_ARMS, "layers": checks.STUDENT_LAYERS}
SEEDS = {"oracle": 3, "compare": 5, "explore": 2}


def main() -> None:
    """Runs one step and those that it needs, or all steps, and writes records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS, nargs="?")
    parser.add_argument("--folder", type=Path, default=Path("runs/reproduction"))
    parser.add_argument("--seeds", type=int, help="how many; by default 3 of the oracle, 5 compared, 2 explored")
    parser.add_argument("--arms", nargs="+", help="some of the arms; by default all")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    for step in [args.step] if args.step else STEPS:
        found = _found(step, args)
        record = args.out / f"reproduction_{step}.json"
        save_result(record, torch.device("cpu"), command_line("benchmarks.reproduction"), found)


def _found(step: str, args: argparse.Namespace) -> dict[str, Any]:
    folder = args.folder
    found = _kept(folder, "world", WORLD_SETTINGS, partial(checks.world, folder))
    if step == "world":
        return found
    if step == "oracle":
        return _runs(args, step, ORACLE_SETTINGS, checks.ORACLE_ARMS, checks.oracle_name, checks.oracle_run)
    found = _kept(folder, "teacher", TEACHER_SETTINGS, partial(checks.teacher, folder))
    if step == "teacher":
        return found
    if step == "attention":
        return _kept(folder, "attention", TEACHER_SETTINGS, partial(checks.attention, folder))
    _kept(folder, "targets", TEACHER_SETTINGS, partial(targets, folder))
    arms = CLAIMED if step == "compare" else EXPLORED
    split = "test" if step == "compare" else "validation"
    found = _runs(
        args,
        step,
        {**COMPARISON_SETTINGS, "split": split},
        arms,
        partial(run_name, split),
        partial(compared_run, split),
    )
    return {**found, "summary": summary(found["arms"])}


def _runs(
    args: argparse.Namespace,
    step: str,
    settings: Mapping[str, Any],
    arms: Mapping[str, Any],
    name_of: Callable[[str, int], str],
    run: Callable[[Path, str, int], dict[str, Any]],
) -> dict[str, Any]:
    """All arms in turns, seed by seed; the runs of earlier commands are kept."""
    found: Runs = {}
    for seed in range(args.seeds or SEEDS[step]):
        for arm in args.arms or arms:
            made = _kept(args.folder, name_of(arm, seed), settings, partial(run, args.folder, arm, seed))
            found.setdefault(arm, {})[f"seed {seed}"] = made
    record = args.out / f"reproduction_{step}.json"
    return {"settings": settings, "arms": with_earlier(record, settings, found)}


def _kept(folder: Path, name: str, settings: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return kept(folder / f"{name}.json", settings, " ".join(command_line("benchmarks.reproduction")), make)


if __name__ == "__main__":
    main()
