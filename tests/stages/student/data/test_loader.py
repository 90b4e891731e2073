"""Loader processes: the same steps for any number of them, and the errors of one are those of the training process."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stages.conversations.answer_rows import AnswerRows
from stages.student.data.batch import Batch
from stages.student.data.config import LoaderConfig
from stages.student.data.loader import MOST_WORKERS, LoaderDied, StepLoader, StoppedWaiting, spare_workers
from storage.errors import CorruptData, UserError
from storage.samples.sample_set import SampleSet
from storage.stores import open_store
from storage.streaming.mixture import Mixture, Source
from storage.streaming.order import StreamConfig
from storage.streaming.stream import StreamedSample
from storage.targets.store import TargetStore
from tests.processes import descendants, is_alive
from tests.storage.builders import extract, pack

SHARDS = (5, 6)
CPU = torch.device("cpu")


def batch_of(samples: Sequence[StreamedSample]) -> Batch:
    """A collator that needs no model."""
    lengths = [len(sample.targets.token_ids) for sample in samples]
    ids = torch.zeros(len(samples), max(lengths, default=0), dtype=torch.long)
    for row, sample in enumerate(samples):
        ids[row, : lengths[row]] = sample.targets.token_ids
    none = torch.zeros(0, dtype=torch.long)
    maps = tuple(sample.maps for sample in samples)
    keys = tuple(sample.key for sample in samples)
    return Batch(keys, {"input_ids": ids}, AnswerRows(none, none, none), torch.zeros(0, 0, dtype=torch.uint8), (), maps)


def refuse_s1(samples: Sequence[StreamedSample]) -> Batch:
    if any(sample.key.startswith("s1") for sample in samples):
        raise UserError("this student cannot read shard 1")
    return batch_of(samples)


def kill_me(samples: Sequence[StreamedSample]) -> Batch:
    os.kill(os.getpid(), signal.SIGKILL)
    return batch_of(samples)


def sleep_long(samples: Sequence[StreamedSample]) -> Batch:
    time.sleep(1000)
    return batch_of(samples)


def make_large(samples: Sequence[StreamedSample]) -> Batch:
    """4 MiB each."""
    return replace(batch_of(samples), logits_RQ=torch.zeros(2**22, 1, dtype=torch.uint8))


def terminate_all(samples: Sequence[StreamedSample]) -> Batch:
    """As a machine that is taken away does with all processes of a job."""
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    return batch_of(samples)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    extract(pack(root / "samples", SHARDS), open_store(root / "targets"))
    return root


def loader(
    root: Path, num_workers: int, collator=batch_of, rank: int = 0, world_size: int = 1, stall_s: float = 100.0
) -> StepLoader:
    config = StreamConfig(seed=1, batch_size=4, microbatch_size=1, bucket_by_length=True)
    return StepLoader(
        Mixture([Source(SampleSet.open(root / "samples"), TargetStore.open(root / "targets"))], config),
        collator,
        rank=rank,
        world_size=world_size,
        device=CPU,
        config=LoaderConfig(num_workers=num_workers, prefetch=2, stall_s=stall_s),
        with_maps=True,
    )


def keys_of(steps) -> list[list[tuple[str, ...]]]:
    return [[batch.keys for batch in step] for step in steps]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_steps_are_the_same_for_any_number_of_loader_processes_and_go_on_over_epochs(data):
    alone = keys_of(loader(data, 0).steps(range(3), 1))
    assert [len(step) for step in alone] == [4, 3, 4, 4, 3, 4, 4, 3]
    for workers in (1, 3):
        assert keys_of(loader(data, workers).steps(range(3), 1)) == alone
    assert keys_of(loader(data, 1).steps(range(1, 3), 0)) == alone[2:]


def test_every_rank_has_as_many_microbatches_also_when_its_share_of_the_last_step_is_empty(data):
    ranks = [keys_of(loader(data, 0, rank=rank, world_size=2).steps(range(1), 0)) for rank in (0, 1)]
    assert [len(step) for step in ranks[0]] == [len(step) for step in ranks[1]] == [2, 2, 2]
    assert ranks[1][-1][-1] == ()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("side", ["tar", "targets"])
def test_damage_met_in_a_loader_process_is_the_error_of_the_training_process(side, workers, data, tmp_path):
    data = shutil.copytree(data, tmp_path / "data")
    if side == "tar":
        file, position = data / "samples/samples-000001.tar", 520
    else:
        (file,), position = (data / "targets").glob("shards/000001-*.zarr/map_codes/c/0/0"), 40
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptData) as caught, closing(loader(data, workers).steps(range(1), 0)) as steps:
        list(steps)
    said = str(caught.value)
    assert ("samples-000001.tar" if side == "tar" else "shard 1 of") in said
    assert f"`cdp verify {data}/targets --samples {data}/samples`" in said
    assert "Traceback" not in said
    assert "worker" not in said


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_collator_refuses_is_the_error_of_the_training_process(workers, data):
    with pytest.raises(UserError, match=r"^this student cannot read shard 1$"):
        list(loader(data, workers, refuse_s1).steps(range(1), 0))


def test_a_loader_process_that_is_killed_ends_the_run_with_what_to_do(data):
    with pytest.raises(LoaderDied, match=r"a loader process died .*train\.loader\.num_workers"):
        list(loader(data, 1, kill_me).steps(range(1), 0))


def test_a_loader_process_that_makes_no_batch_ends_the_run_after_the_time_it_was_given(data):
    with pytest.raises(LoaderDied, match=r"no batch came from the loader processes for 1\.5 s; /dev/shm.* free"):
        list(loader(data, 1, sleep_long, stall_s=1.5).steps(range(1), 0))


def test_a_run_that_is_asked_to_stop_while_it_waits_for_a_batch_stops(data):
    asked = iter([False, False, True])
    with pytest.raises(StoppedWaiting):
        list(loader(data, 1, sleep_long).steps(range(1), 0, lambda: next(asked)))


SMALL_MEMORY = """
import sys
from pathlib import Path
from storage.errors import UserError
from tests.stages.student.data.test_loader import loader, make_large
steps = loader(Path(sys.argv[1]), int(sys.argv[2]), make_large).steps(range(1), 0)
try:
    print(len(list(steps)), "steps")
except UserError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mounted", "workers", "expected"),
    [
        ("size=1m", 1, "a batch of 4.0 MiB cannot be put into shared memory"),
        ("size=10m", 1, "3 batches of 4 MiB that are ready at one time need 12 MiB"),
        ("size=64m,ro", 1, "loader processes cannot be started: "),
        ("size=64m", 1, "3 steps"),
        ("size=1m", 0, "3 steps"),
    ],
)
def test_shared_memory_that_is_too_small_or_read_only_is_named_and_nothing_waits(mounted, workers, expected, data):
    mount = f"mount -t tmpfs -o {mounted} tmpfs /dev/shm"
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "sh", "-c", mount], check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    words = [sys.executable, "-c", SMALL_MEMORY, str(data), str(workers)]
    command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.startswith(expected), done.stderr
    if "steps" not in expected:
        assert "/dev/shm, the shared memory, has" in done.stdout
        assert ("mounted read-only" in done.stdout) == ("ro" in mounted)
        assert "Traceback" not in done.stderr


def test_loader_processes_outlive_signals_to_the_whole_group_and_end_with_their_steps(data):
    steps = loader(data, 1, terminate_all).steps(range(1), 0)
    assert [len(batch.keys) for batch in next(steps)] == [1, 1, 1, 1]
    workers = _loader_processes(os.getpid())
    assert len(workers) == 1
    begun = time.monotonic()
    steps.close()
    assert time.monotonic() - begun < 4
    assert not workers & _loader_processes(os.getpid())


TRAINER = """
import sys, time
from pathlib import Path
from tests.stages.student.data.test_loader import loader
steps = loader(Path(sys.argv[1]), 2).steps(range(1), 0)
next(steps)
print("loading", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_loader_processes_end_with_a_training_process_that_is_killed(data):
    command = [sys.executable, "-c", TRAINER, str(data)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "loading\n"
        workers = _loader_processes(trainer.pid)
        assert len(workers) == 2
        trainer.kill()
    deadline = time.monotonic() + 20
    while (left := list(filter(is_alive, workers))) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def _loader_processes(of: int) -> set[int]:
    """Those that the process `of` or a child of it began."""
    found = set()
    for pid in descendants(of):
        with suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().strip() == "pt_data_worker" and is_alive(pid):
                found.add(pid)
    return found


def test_loaders_take_the_cores_that_nothing_computes_with(monkeypatch):
    cores, threads = 16, 1
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert spare_workers(torch.device("cuda")) == MOST_WORKERS == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert spare_workers(torch.device("cuda")) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    threads = 8
    assert spare_workers(CPU) == 0
    threads = 6
    assert spare_workers(CPU) == 2
    cores = 1
    assert spare_workers(torch.device("cuda")) == 0
