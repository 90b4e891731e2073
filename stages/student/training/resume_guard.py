"""What a stage's folder was begun with, and the refusal to go on in it with anything else."""

import json
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from stages.checkpoints import resolve_checkpoint, weights_digest
from stages.student.config import HARMLESS_ON_RESUME, StageName, TrainConfig
from stages.student.training.stage import StageRun
from storage.errors import FingerprintMismatch
from storage.stores import open_store

STAGE_FILE = "stage.json"
_PLACES = {"samples", "targets", "sources", "subset"}
"""Settings that say where data lies; what counts is what lies there."""
_MATCHING = ("student_layers", "num_matched", "matching", "layers")


def check_resumable(run: StageRun) -> None:
    """Compares what the stage is with what its folder and the stage before were begun with; changes nothing.

    Raises:
        FingerprintMismatch: the folder was begun with other settings, which are named, or from another student; or the
            student that it starts from was made of another decoder.
    """
    _check_decoder(run)
    store = open_store(run.output)
    if not store.exists(STAGE_FILE):
        return
    stage, found = _description(run), json.loads(store.read(STAGE_FILE))
    # A setting that the folder's version did not have counts as its default.
    defaults = _settings(TrainConfig(), run.name)
    flat_found, flat_wanted = (_flat(defaults, description) for description in (found, stage))
    # Which layers would be matched decides nothing of a stage that matches none.
    unused = {"settings", *(() if run.stage.attention_weight > 0 else _MATCHING)}
    differing = [k for k in flat_wanted if k not in unused and flat_found.get(k) != flat_wanted[k]]
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
    _check_start(run, found)


def record_stage_settings(run: StageRun) -> None:
    """Writes down what the stage is, unless its folder says so already.

    Raises:
        FingerprintMismatch: as `check_resumable`.
    """
    check_resumable(run)
    store = open_store(run.output)
    if not store.exists(STAGE_FILE):
        store.write(STAGE_FILE, json.dumps({**_description(run), **_start(run)}, indent=1).encode())


def _check_decoder(run: StageRun) -> None:
    if run.initial is None:
        return
    before = open_store(run.initial.parent)
    if not (run.initial.is_dir() and before.exists(STAGE_FILE)):
        return
    found, wanted = json.loads(before.read(STAGE_FILE))["decoder"], decoder_digest(run.decoder)
    if found != wanted:
        raise FingerprintMismatch(
            f"{run.output} would start from {run.initial}, which was made of a decoder with weights {found[:12]}, but "
            f"--student is {run.decoder} with weights {wanted[:12]}; name the decoder that the run began with, or "
            "another --output"
        )


def _check_start(run: StageRun, found: dict[str, Any]) -> None:
    """A checkpoint holds what was trained only; on another base it would be another student."""
    start = _start(run)
    # Weights that are not known yet, or were not written down by the folder's version, are any.
    known = start["start_weights"] and found.get("start_weights")
    if found["starts_from"] == start["starts_from"] and (not known or known == start["start_weights"]):
        return
    begun, now = (
        one["starts_from"] + (f" with weights {digest[:12]}" if (digest := one.get("start_weights")) else "")
        for one in (found, start)
    )
    raise FingerprintMismatch(
        f"{run.output} was begun from {begun}, now it would start from {now}; put back the student that it was begun "
        "from, or train it in a new folder"
    )


def _start(run: StageRun) -> dict[str, Any]:
    name = "decoder" if run.initial is None else run.initial.parent.name
    return {"starts_from": name, "start_weights": start_weights(run)}


def start_weights(run: StageRun) -> str | None:
    """sha256 of the weights of the student that the stage goes on from, None if it does not, or that is yet to come."""
    return None if run.initial is None or not run.initial.is_dir() else _weights(run.initial)


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


def decoder_digest(decoder: str) -> str:
    """sha256 of the weights of the decoder that a run starts from."""
    return _weights(_local_folder(decoder))


_local_folder = lru_cache(resolve_checkpoint)


def _weights(folder: Path) -> str:
    """Their digest, for which they are read again only if a file has changed: there may be gigabytes."""
    files = [(file.name, file.stat()) for file in sorted(folder.glob("*.safetensors"))]
    return _digest_of(folder, tuple((name, seen.st_size, seen.st_mtime_ns, seen.st_ino) for name, seen in files))


@lru_cache
def _digest_of(folder: Path, _files: tuple[tuple[str, int, int, int], ...]) -> str:
    return weights_digest(folder)
