"""Where a file should be, there may be a FIFO, a device, a socket, a folder, a loop of links or a giant.

Every reader of a file that somebody named ends at once, in little memory, with an error that names the file.
"""

import ast
import os
import re
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.chat import open_chat
from pipeline.run_file import load_run_file
from pipeline.sweep_file import load_sweep
from stages.checkpoints.configs import check_configs
from stages.checkpoints.resolve import resolve_checkpoint
from stages.conversations.chat_templates import read_template
from stages.convert.released_config import read_released_config
from stages.evaluation.config import SuiteConfig
from stages.evaluation.loaded_suite import load_suite
from stages.evaluation.result import read_result
from stages.evaluation.suites.pictures import PictureFile, SuitePicture
from stages.samples.first_look import check_layout
from stages.samples.image_files import ImageFolder
from stages.samples.staged_folder import StagedFolder
from stages.student.run_folder import StageFolder
from stages.student.student_kind import is_student
from stages.student.training.checkpoint import STATE, Checkpoints, TrainerState
from stages.student.training.metrics import metrics_log
from stages.unusable_sample import UnusableSample
from storage.digests import file_sha256
from storage.errors import CorruptData, UserError
from storage.integrity.checks import Checks
from storage.progress import SILENT
from storage.regular_files import read_regular
from storage.samples.sample_set import SampleSet
from storage.samples.shard_reader import SampleShard
from storage.samples.shard_writer import SampleShardWriter
from storage.stores import FileInfo, open_store
from storage.streaming.source_checks import read_keys
from storage.targets.array_reader import ArrayReader
from storage.targets.chunk_bounds import ArrayMetadata
from storage.targets.commits import CommitRecord
from storage.targets.manifest import Manifest
from storage.targets.teacher_assets import TeacherRecord
from tests.import_arrows import python_files
from tests.storage.builders import stored_samples

ROOT = Path(__file__).parent.parent
GIANT = 40 * 2**30
MEMORY = 256 * 2**20
LIMIT_S = 1.0


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_socket(path: Path) -> None:
    # Its name may have some hundred bytes at most.
    here = Path.cwd()
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path.name)
    os.chdir(here)


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_giant(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(GIANT)


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a FIFO": (make_fifo, "FIFO"),
    "a device": (make_device, "device"),
    "a socket": (make_socket, "socket"),
    "a folder": (Path.mkdir, "folder"),
    "a loop of links": (make_loop, "loop of links"),
    "a giant": (make_giant, f"{GIANT:,}|{GIANT}"),
}


def samples_in(folder: Path) -> None:
    with SampleShardWriter(folder, 9, 10**6) as writer:
        writer.add_group(stored_samples(["a"]))


def read_tar(file: Path) -> None:
    """As many bytes as it says: none, like a FIFO or a device."""
    samples = SampleSet.open(file.parent)
    SampleShard(file, replace(samples.index.shards[0], bytes=0), ())


def read_chunk(file: Path) -> None:
    metadata = ArrayMetadata((2,), np.dtype("<u4"), (2,), (1,), False, False, 12)
    ArrayReader(file.parents[2], "a", metadata).read()


def read_suite_image(file: Path) -> None:
    SuitePicture(PictureFile(file)).load(10**6, "ignore")


def read_metrics(file: Path) -> None:
    with metrics_log(file.parent, (), 0, {}, enabled=True):
        pass


def publish_again(file: Path) -> None:
    with StagedFolder(file.parent) as staged:
        (staged.path / "index.json").write_text("{}")
        staged.publish()


def write_config(file: Path) -> None:
    (file.parent / "config.json").write_text("{}")


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "manifest": ("manifest.json", lambda file: Manifest.load(open_store(file.parent))),
    "commit record": (
        "commits/000000.json",
        lambda file: CommitRecord.load(open_store(file.parents[1]), "commits/000000.json"),
    ),
    "taken name": ("a.json", lambda file: open_store(file.parent).create("a.json", b"") or 1 / 0),
    "sample index": ("index.json", lambda file: SampleSet.open(file.parent)),
    "member table": ("samples-000000.json", lambda file: SampleSet.open(file.parent).members(0)),
    "tar": ("samples-000000.tar", read_tar),
    "chunk": ("a/c/0", read_chunk),
    "digest": ("a", file_sha256),
    "samples": ("a.json", check_layout),
    "image": ("a.png", lambda file: ImageFolder(file.parent, 10**6, 10**6).read("a.png")),
    "packed before": ("index.json", publish_again),
    "run file": ("run.yaml", lambda file: load_run_file(file, [], {})),
    "sweep": ("sweep.yaml", lambda file: load_sweep(file, None, [], {})),
    "subset": ("keys.txt", read_keys),
    "chat template": ("a.jinja", lambda file: read_template(str(file))),
    "suite": ("kind.json", lambda file: load_suite("sugarcrepe", SuiteConfig(data=file.parent))),
    "suite image": ("a.png", read_suite_image),
    "image of a chat": ("a.png", lambda file: open_chat("no model", file, 1)),
    "evaluation": ("result.json", read_result),
    "stage report": ("report.json", lambda file: StageFolder(file.parent).report()),
    "metrics": ("metrics.jsonl", read_metrics),
    "config": ("config.json", lambda file: check_configs(file.parent)),
    "released config": ("config.json", lambda file: read_released_config(file.parent)),
    "config of a student": ("config.json", lambda file: is_student(file.parent)),
}
STREAMED = ("tar", "chunk", "digest", "samples", "metrics")
"""May be as large as they are."""
REPLACED = ("metrics", "packed before")
"""Written anew over a loop of links, like over nothing."""
CASES = [
    (reader, kind)
    for reader in READERS
    for kind in KINDS
    if not ((kind == "a giant" and reader in STREAMED) or (kind == "a loop of links" and reader in REPLACED))
]


@contextmanager
def within_limits() -> Iterator[None]:
    """A second, and a quarter of a gibibyte."""

    def too_long(*_: object) -> None:
        raise TimeoutError

    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(("reader", "kind"), CASES)
def test_what_is_no_file_of_ours_is_refused_at_once_by_name(tmp_path: Path, reader: str, kind: str) -> None:
    name, read = READERS[reader]
    make, said = KINDS[kind]
    file = tmp_path / name
    if name.startswith("samples-"):
        samples_in(tmp_path)
        file.unlink()
    file.parent.mkdir(parents=True, exist_ok=True)
    make(file)
    with within_limits(), pytest.raises((UserError, UnusableSample), match=file.name) as refusal:
        read(file)
    # Of an image packing counts reasons.
    assert reader == "image" or re.search(said, str(refusal.value)), str(refusal.value)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("kind", ["a FIFO", "a device", "a socket", "a loop of links"])
def test_a_checkpoint_with_a_special_file_is_refused_before_a_library_reads_it(
    tmp_path: Path, name: str, kind: str
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    make, said = KINDS[kind]
    make(tmp_path / name)
    with within_limits(), pytest.raises(UserError, match=f"{name} is .*{said}"):
        resolve_checkpoint(tmp_path)


def test_a_link_to_nothing_in_a_checkpoint_is_left_to_the_library(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").symlink_to("nothing")
    assert resolve_checkpoint(tmp_path, with_weights=False) == tmp_path


@pytest.mark.parametrize("kind", ["a FIFO", "a device", "a socket", "a folder", "a loop of links", "a giant"])
def test_a_training_checkpoint_whose_state_is_no_file_counts_as_damaged(tmp_path: Path, kind: str) -> None:
    step = tmp_path / "step-00000002"
    step.mkdir()
    KINDS[kind][0](step / STATE)
    parameters = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(parameters.parameters(), lr=1.0)
    state = TrainerState(parameters, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))
    with within_limits(), pytest.raises(UserError, match="all 1 checkpoints"):
        Checkpoints(tmp_path, 2).restore(state)


def test_verify_finds_a_committed_file_that_became_a_special_one_of_its_size(tmp_path: Path) -> None:
    record = TeacherRecord.build(files={"empty": FileInfo(0, sha256(b"").hexdigest())}, manifest="m")
    (tmp_path / record.path).mkdir(parents=True)
    make_fifo(tmp_path / record.path / "empty")
    checks = Checks(open_store(tmp_path), SILENT.task("verify"))
    checks.check_sizes("teacher", record, checks.store.sizes())
    checks.check_digests("teacher", record, checks.store)
    assert [(finding.file, finding.found) for finding in checks.findings] == [("empty", "no such file")]


def test_a_regular_file_is_read_whole_up_to_its_limit_also_through_a_link_and_while_it_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"123")
    link.symlink_to(file)
    assert read_regular(link, 3) == b"123"
    with pytest.raises(CorruptData, match="file has 3 bytes, at most 2"):
        read_regular(file, 2)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "absent")
    for absent in (Path("x" * 5000), file / "below", Path("nul\0")):
        with pytest.raises(CorruptData, match="expected a regular file"):
            read_regular(absent)
    # As if it had been empty when it was looked at.
    real = os.fstat
    monkeypatch.setattr(os, "fstat", lambda file: os.stat_result((*real(file)[:6], 0, *real(file)[7:])))
    assert read_regular(file, 3) == b"123"
    with pytest.raises(CorruptData, match="file has 3 bytes, at most 2"):
        read_regular(file, 2)


OTHER_READERS = {
    "pipeline/runtime/cpu_determinism.py": "the kernel's",
    "pipeline/ui/report/render.py": "the package's own",
    "stages/checkpoints/processors.py": "of a checkpoint without special files",
    "stages/checkpoints/weights.py": "of a checkpoint without special files",
    "storage/safe_path.py": "the project's own",
    "storage/stores/cache.py": "of this user's cache",
    "storage/stores/owner.py": "the kernel's",
}
"""Files that read others than `storage/regular_files.py` opens, and whose these are."""


def opens_for_reading(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("read_bytes", "read_text"):
        return True
    modes = call.args if isinstance(call.func, ast.Attribute) else call.args[1:2]
    return name == "open" and all(isinstance(mode, ast.Constant) and str(mode.value).startswith("r") for mode in modes)


def test_all_other_files_are_opened_by_one_owner() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for path in python_files(ROOT, "pipeline", "stages", "storage")
        if any(
            isinstance(node, ast.Call) and opens_for_reading(node)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        )
    }
    assert found - {"storage/regular_files.py"} == OTHER_READERS.keys()
