"""What lies where in the folder of a training run: a folder a stage, with its student, checkpoints and report."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stages.settings import RENAMED, flattened, validated
from stages.student.layer_matching import MatchingConfig
from stages.student.stage_config import STAGES, StageName
from storage.digests import parse_object
from storage.errors import CorruptData, NoHardLinks, UserError
from storage.regular_files import read_regular
from storage.stores import open_store
from storage.strict_model import StrictModel

STAGE_FILE, REPORT_FILE, STUDENT = "stage.json", "report.json", "student"
_RESTORE = "restore it, or train into a new folder"


class ValidationReport(StrictModel):
    """The losses of a stage's student on the samples that it was not trained on."""

    samples: int
    """How many were held out."""
    losses: dict[str, float]
    """Each term at the end of the stage, as if these samples were one batch."""
    time_share: float
    """Share of the stage's seconds in which losses on them were measured."""


class StageReport(StrictModel):
    """What a finished stage did; saved as `report.json` beside its student."""

    stage: StageName
    steps: int
    samples: int
    trained_parameters: int
    seconds: float
    samples_per_s: float
    first_batch_s: float = 0.0
    """Seconds until the first data came, after the last start: loader processes began and opened the stores. 0 when
    no step was left to do by then, and in reports of versions that did not measure it."""
    wait_share: float
    """Share of the time since then that the loop waited for data."""
    losses: dict[str, float]
    """Each term, mean over the last tenth of the steps."""
    validation: ValidationReport | None = None
    """None for a stage that held out no samples."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class StageDescription:
    """All that decides the weights a stage ends with; `stage.json` in its folder.

    Attributes:
        data: what it trains, on what, from which weights; as digests.
        settings: by dotted names, without `train.`.
    """

    data: dict[str, Any]
    settings: dict[str, Any]


@dataclass(frozen=True)
class StageFolder:
    """The folder of one stage, which may not exist yet."""

    path: Path

    @classmethod
    def of_student(cls, student: Path) -> "StageFolder":
        """Where a saved student lies; not begun if the student is no stage's."""
        return cls(student.absolute().parent)

    @property
    def student(self) -> Path:
        """Hugging Face folder of the student that the stage saves at its end."""
        return self.path / STUDENT

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def is_begun(self) -> bool:
        """Whether it says what the stage is."""
        return (self.path / STAGE_FILE).is_file()

    @property
    def is_finished(self) -> bool:
        """Whether the student is saved."""
        return (self.path / REPORT_FILE).is_file()

    def begin(self, stage: StageDescription) -> None:
        """Writes down what the stage is, unless another run did so first; what that wrote is left as it is."""
        content = {**stage.data, "settings": stage.settings}
        store, data = open_store(self.path), json.dumps(content, indent=1).encode()
        try:
            store.create(STAGE_FILE, data)
        except NoHardLinks:
            store.write(STAGE_FILE, data)

    def begun_with(self) -> StageDescription | None:
        """What `begin` wrote, also in another version of the project; None for a stage that was not begun.

        Raises:
            CorruptData: If it is something else.
        """
        store = open_store(self.path)
        if not store.exists(STAGE_FILE):
            return None
        where = f"{store.url}/{STAGE_FILE}"
        data = parse_object(store.read(STAGE_FILE), where, _RESTORE)
        said = data.pop("settings", {})
        decoder, start = data.get("decoder"), data.get("starts_from")
        is_name = isinstance(start, str) and start == Path(start).name and start not in ("", "..")
        if not (isinstance(said, dict) and isinstance(decoder, str) and is_name):
            raise CorruptData(f"{where} does not say settings, decoder and former stage of a stage; {_RESTORE}")
        settings = flattened(said, "train.")
        # Earlier versions wrote the stage's own settings beside the others.
        settings |= {f"train.{name}": data.pop(name) for name in list(data) if "." in name}
        return StageDescription(
            data, {RENAMED.get(name, name).removeprefix("train."): settings[name] for name in settings}
        )

    def matching(self) -> MatchingConfig | None:
        """Which layers the stage matches; None for a stage that was not begun.

        Raises:
            UserError: As `begun_with`; if it names other layers than can be.
        """
        if (begun := self.begun_with()) is None:
            return None
        prefix, settings = "matching.", begun.settings
        own = {name.removeprefix(prefix): settings[name] for name in settings if name.startswith(prefix)}
        return validated(MatchingConfig, own, f"{self.path / STAGE_FILE}: {prefix[:-1]}")

    def finish(self, report: StageReport) -> None:
        """Writes the report; after the student, since a stage with a report is finished."""
        open_store(self.path).write(REPORT_FILE, report.to_json().encode())

    def report(self) -> StageReport:
        """The report of a finished stage.

        Raises:
            UserError: If it is not one of this version.
        """
        path = self.path / REPORT_FILE
        try:
            return StageReport.model_validate_json(read_regular(path))
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors())
            raise UserError(
                f"{path} is not a stage's report as this version writes it ({wrong}); go on with the version that "
                "wrote it, or remove the file: the stage then goes on from its newest checkpoint and is saved again"
            ) from error


@dataclass(frozen=True)
class RunFolder:
    """The folder of a training run, which may not exist yet."""

    path: Path

    def stage(self, name: StageName) -> StageFolder:
        """The folder of one stage."""
        return StageFolder(self.path / name)

    @property
    def run_file(self) -> Path:
        """The resolved settings of the last command that trained here."""
        return self.path / "run.yaml"

    @property
    def holds_stages(self) -> bool:
        """Whether it is the folder of a training run.

        A folder that is called as a stage is does not make it one: a student of a sweep may be.
        """
        return any(self.stage(name).is_begun for name in STAGES)

    def finished(self) -> list[StageName]:
        """The stages that are finished, in order."""
        return [name for name in STAGES if self.stage(name).is_finished]

    def last_student(self) -> Path:
        """The student of the last stage that is finished.

        Raises:
            UserError: If none is.
        """
        if not (finished := self.finished()):
            raise UserError(f"{self.path} holds no finished stage; run `cdp train-student --output {self.path}`")
        return self.stage(finished[-1]).student

    def refuse_existing(self, stages: Sequence[StageName]) -> None:
        """Refuses a folder that holds one of these stages already, for a run that is to begin anew."""
        for name in stages:
            if self.stage(name).path.exists():
                raise UserError(
                    f"{self.path} holds {name} already; name a new --output, or leave out --no-resume to go on"
                )

    def write_summary(self) -> None:
        """Writes `summary.json`: the reports of all finished stages, also of earlier commands.

        Raises:
            CorruptData: If one is no JSON object.
        """
        paths = {name: self.stage(name).path / REPORT_FILE for name in self.finished()}
        reports = {name: parse_object(read_regular(path), str(path), _RESTORE) for name, path in paths.items()}
        open_store(self.path).write("summary.json", json.dumps(reports, indent=1).encode())
