"""Settings as data: their dotted names, what they mean, former names, and whether they may change at resume."""

from enum import StrEnum
from typing import Any

from pydantic import BaseModel


class AtResume(StrEnum):
    """What may become of a setting between a kill and the resume; in `Annotated`, of a field or a whole section.

    A field without one decides the result: a run folder that was begun with another value refuses it.
    """

    MAY_CHANGE = "may change"
    """Decides speed, bookkeeping or what is refused, not the result."""
    SAME_DATA = "may change, to a place that holds the same data"
    IF_UNMATCHED = "may change for stages without the attention loss"


RENAMED = {
    "teacher.tail_draws": "teacher.tail_samples",
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


def name_today(name: str) -> str:
    """What a setting of that dotted name is called in this version."""
    return RENAMED.get(name, name)


def lasting(config: BaseModel, *, matched: bool = True, prefix: str = "") -> dict[str, Any]:
    """The settings that must stay the same at resume, by dotted name, as JSON holds them.

    Args:
        config: the settings.
        matched: whether student layers are matched with teacher layers; without it, which ones decides nothing.
        prefix: put before each name.
    """
    found: dict[str, Any] = {}
    for name, value in config.model_dump(mode="json").items():
        rules = [rule for rule in type(config).model_fields[name].metadata if isinstance(rule, AtResume)]
        section = getattr(config, name)
        if rules and (rules != [AtResume.IF_UNMATCHED] or not matched):
            continue
        if isinstance(section, BaseModel):
            found |= lasting(section, matched=matched, prefix=f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def flattened(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections side by side, by dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= flattened(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
