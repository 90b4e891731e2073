"""Refuses to go on with a stage whose folder was begun with other settings, data or weights."""

from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from stages.checkpoints.gguf import gguf_file
from stages.checkpoints.gguf_decoder import gguf_digest
from stages.checkpoints.resolve import resolve_student
from stages.checkpoints.weight_files import weight_files
from stages.checkpoints.weights import weights_digest
from stages.settings import lasting, refuse_other_settings
from stages.student.run_folder import StageDescription, StageFolder
from stages.student.stage_config import STAGES, StageName
from stages.student.training.stage_run import StageRun
from stages.student.training.train_config import TrainConfig
from storage.digests import digest_of
from storage.errors import FingerprintMismatch
from storage.streaming.source_checks import read_keys


def check_resumable(run: StageRun) -> None:
    """Compares a stage with what its folder and the stage before it were begun with; changes nothing.

    Raises:
        FingerprintMismatch: If the folder was begun with other settings, which are named, or from another student; or
            if the student that the stage starts from was made of another decoder.
    """
    _check_decoder(run)
    begun = run.folder.begun_with()
    if begun is None:
        return
    # In a stage without an attention loss, it does not matter which layers would be matched.
    wanted = _data(run) | _settings(run.config, run.name, matched=run.stage.matches_layers)
    # A setting that the folder's version did not have counts as its default. What positions its student has is known
    # from the student or from this lack (`StageSetup`).
    found = {**_settings(TrainConfig(), run.name), "positions": run.config.positions, **begun.data, **begun.settings}
    how, instead = "with other settings", "or use the settings of its run.yaml to resume"
    if "shards" in found:
        how = "while its targets were incomplete, or with other settings"
        instead = "since other shards are another order of samples"
    refuse_other_settings(str(run.output), found, wanted, how, f"train into a new folder, {instead}")
    _check_start(run, begun.data)


def record_stage(run: StageRun) -> None:
    """Writes down what the stage begins with, unless its folder has that already.

    Raises:
        FingerprintMismatch: As `check_resumable`.
    """
    check_resumable(run)
    if not run.folder.is_begun:
        run.folder.begin(StageDescription(_data(run) | _start(run), _settings(run.config, run.name)))


def _check_decoder(run: StageRun) -> None:
    if run.initial is None or not run.initial.is_dir():
        return
    if (begun := StageFolder.of_student(run.initial).begun_with()) is None:
        return
    found, wanted = begun.data["decoder"], decoder_digest(run.decoder)
    if found != wanted:
        raise FingerprintMismatch(
            f"{run.output} would start from {run.initial}, which was made of a decoder with weights {found[:12]}, but "
            f"--student is {run.decoder} with weights {wanted[:12]}; name the decoder that the run began with, or "
            "another --output"
        )


def _check_start(run: StageRun, found: dict[str, Any]) -> None:
    """A checkpoint holds only what was trained; on other weights it would be another student."""
    start = _start(run)
    # Weights may not be known yet, or the folder's version did not write them down.
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
    """sha256 of the weights of the student that the stage starts from; None for a decoder, or while it is not there."""
    return None if run.initial is None or not run.initial.is_dir() else _weights(run.initial)


def _data(run: StageRun) -> dict[str, Any]:
    """What the stage trains, and on which samples and targets."""
    sources = [source.description() for source in run.sources]
    listed = run.validation_subset
    return {
        "stage": run.name,
        "decoder": decoder_digest(run.decoder),
        "validation_subset": None if listed is None else digest_of(sorted(read_keys(listed))),
        # One list for each, so that a refusal names what differs.
        **{name: [source.get(name) for source in sources] for name in chain.from_iterable(sources)},
    }


def _settings(config: TrainConfig, stage: StageName, *, matched: bool = True) -> dict[str, Any]:
    """All settings that decide the weights a stage ends with."""
    others = tuple(f"{name}." for name in STAGES if name != stage)
    return {name: value for name, value in lasting(config, matched=matched).items() if not name.startswith(others)}


def decoder_digest(decoder: str) -> str:
    """sha256 of the weights of the decoder that a run starts from."""
    return _weights(_local_folder(decoder))


@lru_cache
def gguf_record(decoder: str) -> dict[str, str]:
    """Digest of the GGUF file that the decoder was read from, as a run records it; empty for another checkpoint."""
    return {} if (file := gguf_file(Path(decoder))) is None else {"decoder_gguf": gguf_digest(file)}


_local_folder = lru_cache(resolve_student)


def _weights(folder: Path) -> str:
    """Digest of a folder's weights; gigabytes are read again only if a file has changed."""
    files = [(file.name, file.stat()) for file in weight_files(folder)]
    return _digest_of(folder, tuple((name, seen.st_size, seen.st_mtime_ns, seen.st_ino) for name, seen in files))


@lru_cache
def _digest_of(folder: Path, _files: tuple[tuple[str, int, int, int], ...]) -> str:
    return weights_digest(folder)
