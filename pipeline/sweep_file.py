"""The sweep file: several students that are trained against one store, and how they are compared."""

# An example:
#
#   config: qwen1.5-4b-to-1.8b      # optional: a run file or recipe for what is not said here
#   train: {seed: 1}                # settings that all share, as in a run file
#   compare: {suites: {sugarcrepe: {data: sugar-crepe}}, similarity_samples: 256}
#   students:                       # what differs, dotted or nested
#     compodistill: {}
#     logits: {train.dft.attention_weight: 0}

import copy
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.recipes import find_config
from pipeline.run_file import RunFile, lay_over, read_document, resolve
from stages.evaluation.config import SuiteConfig
from stages.evaluation.loaded_suite import LoadedSuite, load_suite
from stages.settings import validated
from storage.errors import UserError
from storage.stores import PARTIAL
from storage.stores.folder_owner import LOCK_FILE
from storage.strict_model import StrictModel

SWEEP_REPORT = "sweep.json"
"""File of all results in a sweep's folder."""
SWEEP_PAGE = "report.html"
"""The same for people, with pictures."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class CompareConfig(StrictModel):
    """What is measured of each student once it is trained; nothing unless asked for."""

    suites: dict[str, SuiteConfig] = Field(default_factory=dict)
    """Suites by name, as in the run file's `evaluate.suites`."""
    similarity_samples: int | None = Field(default=None, ge=1)
    """Samples over which the student's attention is compared with the cached maps."""
    pictures: int | None = Field(default=None, ge=1)
    """Samples whose attention the page of all students shows, `OUTPUT/report.html`; None writes no page."""


@dataclass(frozen=True)
class Sweep:
    """Students by name, in the file's order, each with its resolved run file; `load_sweep` makes one."""

    output: Path
    runs: dict[str, RunFile]
    compare: CompareConfig

    @cached_property
    def suites(self) -> dict[str, LoadedSuite]:
        """Those that students are compared by; their folders are read once a sweep."""
        return {name: load_suite(name, suite) for name, suite in self.compare.suites.items()}


def load_sweep(path: Path, config: Path | None, settings: list[str], flags: dict[str, Any]) -> Sweep:
    """All students' run files, checked before any of them trains.

    What wins over what: the base, the file's shared settings, the student's own, `--set`, flags.

    Args:
        path: the sweep file.
        config: base run file or recipe; None takes the one that the file names, if any.
        settings: `--set` strings, for all students.
        flags: dotted names to values, for all students; `output` is the folder of the sweep.

    Raises:
        UserError: If the file is unreadable, a student's name is taken or names no folder, a student's setting is
            unknown or out of range, or the comparison lacks something.
    """
    document = read_document(path)
    base, students = document.pop("config", None), document.pop("students", None)
    compare = validated(CompareConfig, document.pop("compare", None) or {}, f"{path}: compare")
    if not isinstance(students, dict) or not students:
        raise UserError(f"{path} names no students; expected `students:` with a name and its settings for each")
    if base is not None and not isinstance(base, str):
        raise UserError(f"{path}: config is {base!r:.100}, expected the path of a run file or the name of a recipe")
    base_path = config or (Path(base) if base is not None else None)
    shared = read_document(find_config(base_path)) if base_path is not None else {}
    lay_over(shared, document, str(path))
    output = resolve(copy.deepcopy(shared), settings, flags, str(path)).output
    if output is None:
        found = f"{path} has no output and --output is missing"
        raise UserError(f"{found}; give the folder of the sweep, each student gets its own in it")
    _check_names(students, path)
    runs = {}
    for name, own in students.items():
        if not isinstance(own or {}, dict):
            raise UserError(f"{path}: student {name} is {own!r:.100}, expected settings such as train.seed: 1")
        run = copy.deepcopy(shared)
        lay_over(run, own or {}, f"{path}: student {name}")
        runs[name] = resolve(run, settings, {**flags, "output": str(Path(output) / name)}, f"{path}: student {name}")
        if compare.similarity_samples is not None or compare.pictures is not None:
            try:
                compared_data(runs[name])
            except UserError as error:
                raise UserError(f"{path}: student {name}: {error}") from None
    sweep = Sweep(Path(output), runs, compare)
    _ = sweep.suites  # what is wrong with them is said before any student trains
    return sweep


def _check_names(students: dict[Any, Any], path: Path) -> None:
    taken: dict[str, str] = {}
    for name in students:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            found = f"{path}: student {name!r:.100} cannot name a folder"
            raise UserError(f"{found}; take up to 100 letters, digits, '-', '_' and '.'")
        if name.lower() in (SWEEP_REPORT, SWEEP_PAGE, LOCK_FILE) or name.lower().endswith(PARTIAL):
            raise UserError(f"{path}: student {name}: the sweep's folder has files of such names; take another")
        if (twin := taken.setdefault(name.lower(), name)) != name:
            found = f"{path}: students {twin} and {name} differ in case alone"
            raise UserError(f"{found}, and on some file systems would share a folder; rename one")


def compared_data(run: RunFile) -> tuple[str, str]:
    """Samples and targets that a student's attention is compared on: the run's, or the first of its sources.

    Raises:
        UserError: If it names neither.
    """
    if run.samples is not None and run.targets is not None:
        return run.samples, run.targets
    if run.train.data.sources:
        return run.train.data.sources[0].samples, run.train.data.sources[0].targets
    raise UserError(
        "what compare.similarity_samples and compare.pictures ask for needs samples and targets, or "
        "train.data.sources; set them for all students"
    )


def check_at_once(sweep: Sweep) -> None:
    """Refuses students at once where several processes train each student.

    Raises:
        UserError: Under a launcher such as torchrun, or if a student trains on a Ray cluster.
    """
    instead = "leave --at-once away: students that several processes train together are trained in turn"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"--at-once is given to each of {os.environ['WORLD_SIZE']} processes of a launcher; {instead}")
    for name, run in sweep.runs.items():
        if run.train.cluster.ray_address is not None or run.train.cluster.workers is not None:
            raise UserError(f"--at-once is given and student {name} trains on a Ray cluster; {instead}")
