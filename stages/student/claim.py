"""What a stage's folder was begun with, and the refusal to go on in it with anything else."""

import json
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from stages.checkpoints import resolve_checkpoint, weights_digest
from stages.student.config import HARMLESS_ON_RESUME, StageName, TrainConfig
from stages.student.stage import StageRun
from storage.errors import FingerprintMismatch
from storage.stores import open_store

STAGE_FILE = "stage.json"
_PLACES = {"samples", "targets", "sources", "subset"}
"""Settings that say where data lies; what counts is what lies there."""
_MATCHING = ("student_layers", "num_matched", "matching", "layers")


def check_output(run: StageRun) -> None:
    """Compares what the stage is with what its folder was begun with; changes nothing.

    Raises:
        FingerprintMismatch: the folder was begun with other settings; names them.
    """
    store = open_store(run.output)
    if not store.exists(STAGE_FILE):
        return
    stage, found = _description(run), json.loads(store.read(STAGE_FILE))
    # A setting that the folder's version did not have counts as its default.
    defaults = _settings(TrainConfig(), run.name)
    flat_found, flat_wanted = (_flat(defaults, description) for description in (found, stage))
    differing = [k for k in flat_wanted if k != "settings" and flat_found.get(k) != flat_wanted[k]]
    if differing and "shards" in found:
        raise FingerprintMismatch(
            f"{run.output} was begun while its targets were incomplete, or with other settings (differs in: "
            f"{', '.join(sorted(differing))}); train into a new folder: other shards are another order of samples"
        )
    if differing:
        raise FingerprintMismatch(
            f"{run.output} was begun with other settings (differs in: {', '.join(sorted(differing))}); "
            "train into a new folder, or use the settings of its run.yaml to resume"
        )


def claim_output(run: StageRun) -> None:
    """Writes down what the stage is, unless its folder says so already.

    Raises:
        FingerprintMismatch: the folder was begun with other settings, or from another student.
    """
    check_output(run)
    store = open_store(run.output)
    start = run.initial.parent.name if run.initial is not None else "decoder"
    if not store.exists(STAGE_FILE):
        store.write(STAGE_FILE, json.dumps({**_description(run), "starts_from": start}, indent=1).encode())
    begun_from = json.loads(store.read(STAGE_FILE))["starts_from"]
    if begun_from != start:
        # A checkpoint holds what was trained only; on another base it would be another student.
        raise FingerprintMismatch(
            f"{run.output} was begun from {begun_from}, now it would start from {start}, a stage trained since; "
            "train it in a new folder"
        )


def _description(run: StageRun) -> dict[str, Any]:
    """All that decides the weights a stage ends with."""
    sources = [source.description() for source in run.sources]
    return {
        "stage": run.name,
        **_settings(run.config, run.name),
        "decoder": decoder_digest(run.decoder),
        # One list for each, so that a refusal names what differs.
        **{name: [source.get(name) for source in sources] for name in chain.from_iterable(sources)},
    }


def _settings(config: TrainConfig, name: StageName) -> dict[str, Any]:
    stage = config.stage(name).model_dump(mode="json", exclude=_PLACES)
    return {
        "settings": config.model_dump(mode="json", exclude={"dpt", "dft", "sft"} | _PLACES | HARMLESS_ON_RESUME),
        **{f"{name}.{key}": value for key, value in stage.items()},
    }


def _flat(defaults: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
    """All of a description side by side; what it lacks of the settings, or of a section of them, as in `defaults`."""
    flat = {**defaults, **defaults["settings"]}
    for name, value in {**description, **description["settings"]}.items():
        inner = flat.get(name)
        flat[name] = {**inner, **value} if isinstance(inner, dict) and isinstance(value, dict) else value
    return flat


def matching_settings(student: Path) -> TrainConfig | None:
    """Which layers a run matched, as settings of their own; None for a checkpoint that lies in no stage's folder."""
    store = open_store(student.absolute().parent)
    if not store.exists(STAGE_FILE):
        return None
    settings = json.loads(store.read(STAGE_FILE)).get("settings", {})
    return TrainConfig.model_validate({name: settings[name] for name in _MATCHING if name in settings})


@lru_cache
def decoder_digest(decoder: str) -> str:
    """sha256 of the weights of the decoder that a run starts from."""
    return weights_digest(resolve_checkpoint(decoder))
