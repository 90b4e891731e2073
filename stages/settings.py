"""Settings as data: dotted names, meanings, former names, checks, and whether they may change at resume."""

import json
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from itertools import islice
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from storage.errors import FingerprintMismatch, UserError

Settings = TypeVar("Settings", bound=BaseModel)

_SHORT = reprlib.Repr()
# A few lines of YAML can stand for a value of any size.
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 200, 200
_SHOWN_ERRORS = 20
"""Problems of one run file that are listed."""


class AtResume(StrEnum):
    """What may become of a setting between a kill and the resume; in `Annotated`, of a field or a whole section.

    A field without one decides the result: a run folder that was begun with another value refuses it.
    """

    MAY_CHANGE = "free"
    """Decides speed, bookkeeping or what is refused, not the result."""
    SAME_DATA = "same data"
    """May name another place that holds the same data."""
    IF_UNMATCHED = "unmatched"
    """May change for stages without an attention loss."""


RENAMED = {
    "teacher.tail_draws": "teacher.tail_samples",
    "estimate.runs": "estimate.num_blocks",
    "estimate.counted_samples": "estimate.num_sampled",
    "estimate.probed_samples": "estimate.num_measured",
    "train.adapter": "train.vision",
    "train.own_adapter": "train.projector",
    "train.sources": "train.data.sources",
    "train.subset": "train.data.subset",
    "train.max_samples": "train.data.max_samples",
    "train.shuffle_shards": "train.data.shuffle_shards",
    "train.allow_incomplete": "train.data.allow_incomplete",
    "train.microbatch_size": "train.loader.microbatch_size",
    "train.bucket_by_length": "train.loader.bucket_by_length",
    "train.num_workers": "train.loader.num_workers",
    "train.prefetch": "train.loader.prefetch",
    "train.student_layers": "train.matching.student_layers",
    "train.num_matched": "train.matching.num_matched",
    "train.matching": "train.matching.kind",
    "train.layers": "train.matching.span",
    "train.parallel": "train.parallel.strategy",
    "train.precision": "train.parallel.precision",
    "train.activation_checkpointing": "train.parallel.activation_checkpointing",
    "train.ray_address": "train.cluster.ray_address",
    "train.workers": "train.cluster.workers",
    "train.max_attempts": "train.cluster.max_attempts",
    "train.checkpoint_every": "train.checkpoint.every",
    "train.keep_checkpoints": "train.checkpoint.keep",
    "train.log_every": "train.logging.every",
    "train.trackers": "train.logging.trackers",
}
"""Settings of earlier versions -> their names today. A run file is told the new name; a run folder is read by it."""


_VAGUE_WORDS = {"num", "max", "of", "the", "size", "grad"}
"""Words in names of settings that say nothing of which one was meant."""


@dataclass(frozen=True)
class Setting:
    """One setting of a section."""

    name: str
    """Dotted, from the top of the run file."""
    type: str
    """In words, with its bounds."""
    default: str
    """As JSON; empty for one that must be given."""
    meaning: str
    at_resume: AtResume | None
    """Its own rule, or that of its section; None for one that must stay the same."""


@dataclass(frozen=True)
class Section:
    """A group of settings; the top of the run file is one without a name."""

    name: str
    meaning: str
    settings: tuple[Setting, ...]


def sections_of(
    model: type[BaseModel], name: str = "", meaning: str = "", rule: AtResume | None = None
) -> Iterator[Section]:
    """All sections of a class of settings, outer ones first; `rule` is what a section around it says."""
    prefix = f"{name}." if name else ""
    inner = {field: found for field, info in model.model_fields.items() if (found := _section(info)) is not None}
    yield Section(
        name,
        meaning,
        tuple(
            Setting(
                f"{prefix}{field}", _type_text(info), _default_text(info), _meaning(model, field), _rule(info) or rule
            )
            for field, info in model.model_fields.items()
            if field not in inner
        ),
    )
    for field, section in inner.items():
        info = model.model_fields[field]
        yield from sections_of(section, f"{prefix}{field}", info.description or "", _rule(info) or rule)


def meant_by(wrong: str, model: type[BaseModel]) -> list[str]:
    """The settings that a wrong dotted name may stand for.

    It is a setting that has the name in another section, one that the name abbreviates (`lr`), one that is spelled
    nearly so, or one that has a word of it. Of several, those in the sections that are named count.
    """
    sections = list(sections_of(model))
    names = [section.name for section in sections[1:]] + [one.name for section in sections for one in section.settings]
    section, _, key = wrong.rpartition(".")
    last = {name: name.rpartition(".")[2] for name in names}
    near_key = get_close_matches(key, [last[name] for name in names if name.rpartition(".")[0] == section], n=1)
    guesses = (
        [name for name in names if name.endswith(f".{wrong}")],
        [name for name in names if last[name] == key],
        [new for old, new in RENAMED.items() if old.rpartition(".")[2] == key and new in names],
        [name for name in names if "".join(word[0] for word in last[name].split("_")) == key],
        [name for name in names if name.rpartition(".")[0] == section and last[name] in near_key],
        [name for name in names if last[name] in get_close_matches(key, last.values(), n=1)],
        [name for name in names if {*key.split("_")} & {*last[name].split("_")} - _VAGUE_WORDS],
    )
    found = next((guess for guess in guesses if guess), [])
    parts = {part for one in sections for part in one.name.split(".")}
    named = {near for part in section.split(".") for near in get_close_matches(part, parts, n=1)}
    in_named = {name: len(named & {*name.split(".")}) for name in found}
    return [name for name in found if in_named[name] == max(in_named.values())]


def validated(model: type[Settings], values: dict[str, Any], origin: str) -> Settings:
    """The settings in `values`; an error says that they come from `origin`.

    Raises:
        UserError: If a setting is unknown or out of range; names each, and what an unknown one may stand for.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = []
        for found in error.errors()[:_SHOWN_ERRORS]:
            name, value = ".".join(map(str, found["loc"])), found.get("input")
            unknown = found["type"] == "extra_forbidden"
            said = "there is no such setting" if unknown else found["msg"]
            for one, shown in islice(_settings_in(value, name), _SHOWN_ERRORS) if unknown else [(name, value)]:
                hint = _hint(one, model) if unknown or one in RENAMED else ""
                lines.append(f"  {one}: {said} (found {_SHORT.repr(shown)}){hint}")
        if (num_more := error.error_count() - _SHOWN_ERRORS) > 0:
            lines.append(f"  and {num_more} more")
        raise UserError(f"{origin}:\n" + "\n".join(lines)) from error


def _settings_in(value: Any, name: str, depth: int = 3) -> Iterator[tuple[str, Any]]:
    """Each setting of an unknown section, as it may have its place elsewhere; a value that is no section is one."""
    if depth and value and isinstance(value, dict):
        for key, inner in value.items():
            yield from _settings_in(inner, f"{name}.{key}", depth - 1)
    else:
        yield name, value


def _hint(wrong: str, model: type[BaseModel]) -> str:
    """What a wrong setting may stand for; empty when nothing is near."""
    if wrong in RENAMED:
        return f"; it is called {RENAMED[wrong]} now"
    meant = meant_by(wrong, model)
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


def lasting(config: BaseModel, *, matched: bool = True, prefix: str = "") -> dict[str, Any]:
    """The settings that must stay the same at resume, by dotted name after `prefix`, as JSON holds them.

    Unless student layers are `matched` with teacher layers, the settings that say which ones decide nothing.
    """
    found: dict[str, Any] = {}
    for name, value in config.model_dump(mode="json").items():
        rule, section = _rule(type(config).model_fields[name]), getattr(config, name)
        if rule is not None and (rule != AtResume.IF_UNMATCHED or not matched):
            continue
        if isinstance(section, BaseModel):
            found |= lasting(section, matched=matched, prefix=f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def refuse_other_settings(folder: str, found: dict[str, Any], wanted: dict[str, Any], how: str, instead: str) -> None:
    """Refuses to go on in a folder that was begun with other values of what is `wanted`.

    Raises:
        FingerprintMismatch: If a value differs; says which, how the folder was begun, and what to do `instead`.
    """
    if differing := sorted(name for name, value in wanted.items() if found.get(name) != value):
        raise FingerprintMismatch(f"{folder} was begun {how} (differs in: {', '.join(differing)}); {instead}")


def flattened(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections side by side, by dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= flattened(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _rule(info: FieldInfo) -> AtResume | None:
    return next((rule for rule in info.metadata if isinstance(rule, AtResume)), None)


def _section(info: FieldInfo) -> type[BaseModel] | None:
    """The class of a section, also of one that need not be given."""
    kinds = (info.annotation, *get_args(info.annotation)) if get_origin(info.annotation) is not tuple else ()
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _meaning(model: type[BaseModel], field: str) -> str:
    """The text below a field, or below the one of a base class that it overrides."""
    bases = (kind.model_fields.get(field) for kind in model.__mro__ if issubclass(kind, BaseModel))
    return " ".join(next((info.description for info in bases if info and info.description), "").split())


def _default_text(info: FieldInfo) -> str:
    return "" if info.is_required() else json.dumps(info.get_default(call_default_factory=True), default=str)


def _type_text(info: FieldInfo) -> str:
    bounds = [
        f"{words} {getattr(bound, key):g}"
        for bound in info.metadata
        for key, words in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
        if getattr(bound, key, None) is not None
    ]
    return ", ".join([_kind_text(info.annotation), *bounds])


def _kind_text(kind: Any) -> str:
    """A type in words, without None, which the meaning explains."""
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    if get_origin(kind) is tuple:
        return f"list of {_kind_text(get_args(kind)[0])}"
    if parts := [part for part in get_args(kind) if part is not NoneType]:
        return " or ".join(map(_kind_text, parts))
    if issubclass(kind, BaseModel):
        return f"{{{', '.join(kind.model_fields)}}}"
    return str(kind.__name__)
