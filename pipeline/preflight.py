"""Looks at what a command was given before it loads a library for it: a mistake is said before they load."""

from pathlib import Path

from pipeline.checkpoints import which_student
from pipeline.run_file import RunFile, need, sources_of
from pipeline.ui.console import is_main_process
from stages.checkpoints.gguf import gguf_file
from stages.checkpoints.resolve import resolve_checkpoint
from stages.teacher.config import TeacherConfig, captured_layers
from storage.digests import parse_object
from storage.errors import UserError
from storage.regular_files import read_regular, refuse_unusable
from storage.samples.index import SampleIndex
from storage.stores import LocalStore, Store, open_store
from storage.stores.recognize import CHECKPOINT, RUN, SAMPLE_SET, TARGET_STORE, what_lies_at
from storage.targets.manifest import MANIFEST_PATH, MAX_LAYERS, Manifest
from storage.writable import check_writable


def check_samples(url: str) -> None:
    """Refuses what is no finished sample set."""
    SampleIndex.load(open_store(url))


def check_targets(url: str) -> None:
    """Refuses what is no target store."""
    Manifest.load(open_store(url))


def check_holds_targets(url: str) -> None:
    """Refuses what has not even a damaged manifest."""
    store = open_store(url)
    if not store.exists(MANIFEST_PATH):
        Manifest.load(store)


def check_new_targets(url: str) -> None:
    """Refuses a place where no target store can be, or that holds something else; one that is begun is taken."""
    _check_output(open_store(url), TARGET_STORE)


def check_model(model: str) -> list[str]:
    """Refuses what is neither a checkpoint, a training run nor a model of the hub; gives the notes of `which_student`.

    Of a model of the hub no weights are fetched yet.
    """
    if notes := which_student(model):
        return notes
    if not (Path(model) / "student" / "config.json").is_file():
        resolve_checkpoint(model, with_weights=False)
    return []


def check_teacher(settings: TeacherConfig) -> None:
    """Refuses what is no checkpoint, or has other layers than are to be captured; no weights are fetched yet."""
    folder = resolve_checkpoint(settings.checkpoint, with_weights=False)
    where = f"{folder}/config.json"
    config = parse_object(read_regular(folder / "config.json"), where, "restore it")
    decoder = config.get("text_config", config)
    num_layers = decoder.get("num_hidden_layers") if isinstance(decoder, dict) else None
    # Otherwise the library knows how many there are, or refuses the checkpoint.
    if isinstance(num_layers, int) and 0 < num_layers <= MAX_LAYERS:
        captured_layers(settings, num_layers)


def check_training(run: RunFile) -> None:
    """Refuses a training without an output, a student, samples or targets that there are.

    The machine that starts a training on a cluster need not see what the cluster sees.
    """
    output = Path(need(run.output, "--output"))
    student = need(run.student, "--student")
    sources = {(one.samples, one.targets) for stage in run.train.stages for one in sources_of(run, stage)}
    refuse_unusable(output)
    if run.train.cluster.ray_address is not None:
        return
    if is_main_process:
        _check_output(LocalStore(output), RUN)
    if gguf_file(Path(student)) is None:
        resolve_checkpoint(student, with_weights=False)
    for samples, targets in sorted(sources):
        check_samples(samples)
        check_targets(targets)


def _check_output(store: Store, kind: str) -> None:
    found = what_lies_at(store)
    if found in {SAMPLE_SET, TARGET_STORE, CHECKPOINT, RUN} - {kind}:
        raise UserError(
            f"{store.url} is {found}, expected {kind} or a new folder"
            + ("; are samples and targets swapped?" if {found, kind} == {SAMPLE_SET, TARGET_STORE} else "")
        )
    if isinstance(store, LocalStore):
        check_writable(store.root)
