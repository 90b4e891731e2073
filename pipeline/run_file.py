"""The run file: every setting of a run in one YAML document, and how flags and `--set` change it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import Field

from pipeline.extraction.config import ExtractConfig
from pipeline.recipes import find_config
from stages.estimate.report import EstimateConfig
from stages.evaluation.config import EvaluationConfig
from stages.settings import AtResume, validated
from stages.student.stage_config import DataSource, StageName
from stages.student.training.train_config import TrainConfig
from stages.teacher.config import TeacherConfig
from storage.errors import UserError
from storage.regular_files import read_regular
from storage.samples.image_settings import DEFAULT_IMAGES, ImageConfig
from storage.stores import Store
from storage.strict_model import StrictModel

_DEEPEST = 8
"""Sections inside one another; settings have three."""
_MAX_BYTES = 2**20
"""Largest run file; real ones have kilobytes, and YAML takes a second for each 200."""
_MOST_VALUES = 10_000
"""Values that a run file may stand for; real ones have hundreds. A few aliases of aliases stand for any number."""

Setting = TypeVar("Setting")


def need(value: Setting | None, flag: str) -> Setting:
    """Returns the value of a setting that a command cannot do without.

    Raises:
        UserError: If there is none; names the flag.
    """
    if value is None:
        raise UserError(f"{flag} is missing; give the flag or set it in the run file")
    return value


class RunFile(StrictModel):
    """All settings; a command uses the sections it needs. Unknown keys fail."""

    samples: Annotated[str | None, AtResume.SAME_DATA] = None
    """Sample shards: a folder or an object-store URL."""
    targets: Annotated[str | None, AtResume.SAME_DATA] = None
    """Target store: a folder or an object-store URL."""
    student: Annotated[str | None, AtResume.SAME_DATA] = None
    """The student's pretrained decoder: a folder, hub id or GGUF file. With `train.vision` own, the folder or hub id of
    a whole multimodal model."""
    output: str | None = None
    """Folder of the training run."""
    teacher: TeacherConfig | None = None
    """Which teacher, and what is kept of what it sees."""
    images: ImageConfig = DEFAULT_IMAGES
    """How pictures are read and placed, in an extraction. Students follow what their targets were made with, and their
    checkpoints say it; the section also holds for a checkpoint that is evaluated and does not say it."""
    extract: Annotated[ExtractConfig, AtResume.MAY_CHANGE] = Field(default_factory=ExtractConfig)
    """How extraction runs."""
    estimate: Annotated[EstimateConfig, AtResume.MAY_CHANGE] = Field(default_factory=EstimateConfig)
    """How an extraction's size and time are estimated."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """How students are trained."""
    evaluate: Annotated[EvaluationConfig, AtResume.MAY_CHANGE] = Field(default_factory=EvaluationConfig)
    """How checkpoints are evaluated."""


def load_run_file(path: Path | None, settings: list[str], flags: dict[str, Any]) -> RunFile:
    """The run file with `--set section.field=value` applied, then the flags that were given.

    Args:
        path: a YAML file or the name of a recipe, or None for the defaults.
        settings: `a.b=value` strings; values are read as YAML.
        flags: dotted names to values; None means the flag was not given.

    Raises:
        UserError: If YAML is unreadable, a setting unknown, or a value out of range; names it.
    """
    document = read_document(find_config(path)) if path is not None else {}
    return resolve(document, settings, flags, str(path or "the settings"))


def resolve(document: dict[str, Any], settings: list[str], flags: dict[str, Any], origin: str) -> RunFile:
    """A document with `--set` and flags applied, as by `load_run_file`; `origin` says in an error where it is from."""
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator:
            raise UserError(f"--set {setting}: expected section.field=value")
        _assign(document, name.strip(), _parse(text, f"--set {setting}"), f"--set {setting}")
    for name, value in flags.items():
        if value is not None:
            _assign(document, name, value, origin)
    return validated(RunFile, document, origin)


def lay_over(document: dict[str, Any], settings: dict[str, Any], origin: str, prefix: str = "") -> None:
    """Puts settings into a document, section by section; names may be dotted, sections nested.

    `origin` says in an error where they are from.

    Raises:
        UserError: If the document has a value where a section is given, or sections are too deep.
    """
    if prefix.count(".") > _DEEPEST:
        raise UserError(f"{origin}: {prefix[:80]}... nests too deep for settings; does a YAML anchor hold itself?")
    for name, value in settings.items():
        if isinstance(value, dict):
            lay_over(document, value, origin, f"{prefix}{name}.")
        else:
            _assign(document, f"{prefix}{name}", value, origin)


def sources_of(run: RunFile, name: StageName) -> Sequence[DataSource]:
    """What a stage trains on: its own sources or places, else those of the run.

    Raises:
        UserError: If samples or targets are missing, or given twice.
    """
    stage, config = run.train.stage(name), run.train
    for section, several, one in (
        (f"train.{name}", stage.sources, (stage.samples, stage.targets, stage.subset)),
        ("train.data", config.data.sources, (run.samples, run.targets, config.data.subset)),
    ):
        if several and any(one):
            raise UserError(
                f"{section}.sources is given, and samples, targets or a subset beside it; leave one of them out "
                "(each of the sources can have a subset)"
            )
    if stage.sources:
        return stage.sources
    if config.data.sources and not (stage.samples or stage.targets):
        if stage.subset:
            raise UserError(
                f"train.{name}.subset is given beside train.data.sources; give each of the sources its subset"
            )
        return config.data.sources
    samples = stage.samples or need(run.samples, "--samples")
    targets = stage.targets or need(run.targets, "--targets")
    return [DataSource(samples=samples, targets=targets, subset=stage.subset or config.data.subset)]


def save_run_file(run: RunFile, store: Store, name: str) -> None:
    """Writes the resolved settings, so that the command can be repeated from them."""
    store.write(name, yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False).encode())


def read_document(path: Path) -> dict[str, Any]:
    """A YAML file of sections, not yet checked.

    Raises:
        UserError: If it cannot be read, is not YAML, or holds something else.
    """
    try:
        data = read_regular(path, _MAX_BYTES)
        text = data.decode()
    except OSError as error:
        raise UserError(f"run file {path} cannot be read: {error.strerror}; check the path") from error
    except UnicodeDecodeError:
        found = f"run file {path} cannot be read as text: it begins with {data[:8]!r}"
        raise UserError(f"{found}; name a YAML file of settings") from None
    document = _parse(text, str(path)) or {}
    if not isinstance(document, dict):
        raise UserError(f"run file {path} holds a {type(document).__name__}, expected sections of settings")
    return document


def _parse(text: str, origin: str) -> Any:
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 it is a SafeLoader
        _num_values(value, {})
    except _RefusedYaml as error:
        raise UserError(f"{origin}: {error}") from None
    except RecursionError:
        raise UserError(f"{origin} nests too deep for a run file") from None
    # The others are what the library raises for tags without a value that fits.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{origin} is not YAML: {error}") from error
    return value


def _num_values(value: Any, counted: dict[int, int]) -> int:
    """How many values it stands for, what an alias repeats counted each time.

    Args:
        value: of a document.
        counted: lists and mappings by their id; 0 for those that hold this one.
    """
    if isinstance(value, str | bytes) and ("\0" in str(value) or not _is_encodable(str(value))):
        raise _RefusedYaml(f"{value!r:.100} holds a character that neither text nor a path can have; remove it")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise _RefusedYaml("it holds a number of more than 64 bits; no setting has one")
    if not isinstance(value, dict | list | set):
        return 1
    if id(value) not in counted:
        counted[id(value)] = 0
        parts = [*value, *value.values()] if isinstance(value, dict) else list(value)
        counted[id(value)] = 1 + sum(_num_values(part, counted) for part in parts)
    if counted[id(value)] > _MOST_VALUES:
        raise _too_many()
    return counted[id(value)]


def _is_encodable(text: str) -> bool:
    """Whether it can be a path; bytes that are no UTF-8 stand in those as single surrogates."""
    try:
        text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


class _RefusedYaml(Exception):
    """YAML that is well-formed and no run file."""


def _too_many() -> _RefusedYaml:
    return _RefusedYaml(f"it stands for more than {_MOST_VALUES:,} values; no run file has as many: write out fewer")


class _Loader(yaml.SafeLoader):
    """The safe loader that refuses repeated keys as they are written, and too many that `<<` brings in."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], yaml.ScalarNode] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and first.setdefault((key.tag, key.value), key) is not key:
                here, there = (one.start_mark.line + 1 for one in (key, first[key.tag, key.value]))
                raise _RefusedYaml(
                    f"line {here} has {key.value} again, after line {there}; only one of them would count: rename or "
                    "remove one"
                )
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > _MOST_VALUES:
            raise _too_many()


def _assign(document: dict[str, Any], dotted: str, value: Any, origin: str) -> None:
    *sections, field = dotted.split(".")
    for section in sections:
        inner = document.get(section)
        if inner is None:
            inner = document[section] = {}
        if not isinstance(inner, dict):
            raise UserError(f"{origin}: {dotted}: {section} is a value, not a section")
        document = inner
    document[field] = value
