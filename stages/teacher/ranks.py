"""The other processes of a teacher that is split over several, as rank 0 sees them: started, given passes, watched.

Rank 0 is the worker itself. It tells the others each forward pass and takes part in it; they wait on their pipes
between passes and end when these do. What a rank computes beside the shared sums is dropped there.

A rank that fails in the middle of a pass leaves the others waiting in a sum that never comes. So whatever ends a pass
badly, on any rank, ends all other ranks, and the next pass begins by starting them and loading the weights anew.
"""

import io
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final, cast

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from stages.teacher.identity import TeacherIdentity
from stages.teacher.rank_messages import Pass, read_fields, write_fields, write_pass
from stages.teacher.tensor_split import join, leave
from storage.errors import UserError
from storage.safe_path import ROOT

RANK_PROCESS: Final = "stages.teacher.rank_process"
PASS_S: Final = 900.0
"""Longest forward pass."""
START_S: Final = 7200.0
"""Longest start of all ranks; weights may come from a slow disk."""
GRACE_S: Final = 30.0
"""After the other ranks were ended, for this one to notice."""
NOTICE_S: Final = 2.0
"""For each to notice that another has ended."""
POLL_S: Final = 0.1

Answer = dict[str, Any]
"""Of a rank: `state`, and `detail` of a failure."""


class RankLost(RuntimeError):
    """Another rank ended or failed; all are started anew for the next pass."""


class Ranks:
    """The ranks of one teacher besides this process, which is rank 0."""

    def __init__(
        self, identity: TeacherIdentity, load: Callable[[], PreTrainedModel], module: str | None = None
    ) -> None:
        """Does not start them; `load` loads rank 0's part, `module` is what the others run."""
        self._identity, self._load, self._module = identity, load, module or RANK_PROCESS
        self.processes: list[subprocess.Popen[bytes]] = []
        """Those that run, rank 1 first."""
        self._meeting: int | None = None
        self._is_running = False
        self._too_late, self._is_aborted = "", False
        self._prefixes: weakref.ref[object] | None = None
        """The last prefixes that all ranks hold."""
        weakref.finalize(self, _end_all, self.processes)

    def holds(self, prefixes: object) -> bool:
        """Whether the other ranks have what belongs to these prefixes."""
        return self._is_running and self._prefixes is not None and self._prefixes() is prefixes

    def hold(self, prefixes: object) -> None:
        """Notes that these are what the other ranks have, of the last pass over prefixes."""
        self._prefixes = weakref.ref(prefixes)

    @property
    def are_running(self) -> bool:
        """Whether they can take part in a pass."""
        return self._is_running

    def start(self) -> PreTrainedModel:
        """Starts all of them, also again; each loads its part. Gives rank 0's.

        Raises:
            RankLost: If a rank ends meanwhile, or does not get ready.
            UserError: If one says that it cannot load its part.
        """
        self.end()
        num_ranks = self._identity.num_ranks
        # A file without a name, which is gone with this process however that ends. NCCL may meet there again later.
        self._meeting = os.memfd_create("cdp-ranks")
        store = Path(f"/proc/{os.getpid()}/fd/{self._meeting}")
        self.processes += [_start(self._module) for _ in range(1, num_ranks)]
        with self._watched(START_S):
            for rank, process in enumerate(self.processes, 1):
                write_fields(_messages_to(process), self._request(rank, store))
            self._answers("ready")
            join(store, 0, num_ranks)
            loaded = self._load()
            self._answers("loaded")
            self._is_running = True
        return loaded

    @contextmanager
    def together(self, asked: Pass) -> Iterator[None]:
        """Around rank 0's part of a pass; the others do theirs, and have done it when the block ends.

        Raises:
            torch.OutOfMemoryError: If another rank's part does not fit into memory.
            RankLost: If another rank fails otherwise.
        """
        assert self._is_running
        if asked.name != "run_continuations":
            self._prefixes = None
        with self._watched(PASS_S):
            for process in self.processes:
                write_pass(_messages_to(process), asked)
            yield
            self._answers("done")

    def end(self) -> None:
        """Ends all of them, whatever they do, and this process's part of their group."""
        self._is_running = False
        self._prefixes = None
        _end_all(self.processes)
        leave()
        if self._meeting is not None:
            os.close(self._meeting)
            self._meeting = None

    def _request(self, rank: int, store: Path) -> dict[str, object]:
        """What a rank must know to load its part."""
        identity = self._identity
        settings = identity.settings.model_copy(update={"checkpoint": str(identity.folder.absolute())})
        return {
            "teacher": settings.model_dump(mode="json"),
            "images": identity.images.model_dump(mode="json"),
            "rank": rank,
            "num_ranks": identity.num_ranks,
            "store": str(store),
            "threads": torch.get_num_threads(),
        }

    def _answers(self, expected: str) -> None:
        """Waits until each has said that it is so far."""
        for rank, process in enumerate(self.processes, 1):
            answer = read_fields(_answers_of(process))
            if answer is None or answer["state"] != expected:
                raise self._failure(rank, process, answer)

    def _failure(self, rank: int, process: "subprocess.Popen[bytes]", answer: Answer | None) -> Exception:
        """What a rank's answer, or that it ended without one, means for rank 0."""
        which = f"rank {rank} of the {self._identity.num_ranks} processes of the teacher"
        if answer is not None and answer["state"] == "out_of_memory":
            return torch.OutOfMemoryError(f"{which}: {answer['detail']}")
        if answer is not None and answer["state"] == "unusable":
            return UserError(f"{which}: {answer['detail']}")
        if answer is not None:
            return RankLost(f"{which} failed: {answer['detail']}")
        with suppress(subprocess.TimeoutExpired):
            process.wait(NOTICE_S)
        code = process.returncode
        how = f"by signal {-code}" if code is not None and code < 0 else f"with status {code}"
        late = self._too_late or "what it printed is in the worker's output, and a kill may be for want of memory"
        return RankLost(f"{which} ended {how}; {late}. All are started again for the next batch")

    @contextmanager
    def _watched(self, limit_s: float) -> Iterator[None]:
        """Inside, a rank that ends ends the others, and so does the limit; whatever leaves the block badly ends all.

        An error that says only that the group is broken is raised as that of the rank which broke it.
        """
        over, self._too_late, self._is_aborted = threading.Event(), "", False
        watcher = threading.Thread(target=self._watch, args=(over, limit_s), daemon=True)
        watcher.start()
        try:
            yield
        except BaseException as error:
            self._is_running = False
            if (cause := self._cause(error)) is not None:
                raise cause from error
            raise
        finally:
            over.set()
            watcher.join(GRACE_S)
            if not self._is_running:
                _kill(self.processes)

    def _cause(self, error: BaseException) -> Exception | None:
        """What another rank failed of, if this error of rank 0 says no more than that one did."""
        is_of_group = isinstance(error, (dist.DistError, BrokenPipeError)) or _is_of_gloo(error)
        if not is_of_group and not (self._is_aborted and isinstance(error, Exception)):
            return None
        found = []
        for rank, process in enumerate(self.processes, 1):
            pipe = _answers_of(process)
            if not select.select([pipe], [], [], NOTICE_S / 2)[0]:
                continue  # it waits for others
            answer = read_fields(pipe)
            if answer is None or "gloo" not in answer.get("detail", "").lower():
                found.append(self._failure(rank, process, answer))
        return min(found, key=lambda one: not isinstance(one, torch.OutOfMemoryError), default=None)

    def _watch(self, over: threading.Event, limit_s: float) -> None:
        """Makes sure that rank 0 leaves the block, in a thread of its own."""
        started = time.monotonic()
        while all(process.poll() is None for process in self.processes):
            if over.wait(POLL_S):
                return
            if time.monotonic() > started + limit_s:
                self._too_late = f"it took more than {limit_s:.0f} s"
                break
        # Rank 0 and the others notice by themselves, as a rule, and say more.
        if over.wait(NOTICE_S):
            return
        _kill(self.processes)
        if torch.cuda.is_available():
            # An operation of NCCL would wait for ever.
            self._is_aborted = True
            leave()
        if not over.wait(GRACE_S):
            print("rank 0 of a teacher waits for ranks that have ended; the worker ends", file=sys.stderr, flush=True)
            os._exit(1)


def _start(module: str) -> "subprocess.Popen[bytes]":
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return subprocess.Popen(  # noqa: S603 - a module of ours
        [sys.executable, "-P", "-m", module, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT.anchor,  # our own may be gone: Ray removes those of jobs
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        start_new_session=True,  # an interrupt at the terminal is not for it
    )


def _messages_to(process: "subprocess.Popen[bytes]") -> IO[bytes]:
    assert process.stdin is not None
    return process.stdin


def _answers_of(process: "subprocess.Popen[bytes]") -> IO[bytes]:
    """Unbuffered, so that `select` knows whether there is one."""
    assert isinstance(process.stdout, io.BufferedReader)
    return cast("IO[bytes]", process.stdout.raw)


def _is_of_gloo(error: BaseException) -> bool:
    """Whether it is what gloo raises where another process has gone, which has no type of its own."""
    return isinstance(error, RuntimeError) and "gloo" in str(error).lower()


def _kill(processes: "Sequence[subprocess.Popen[bytes]]") -> None:
    for process in processes:
        process.kill()


def _end_all(processes: "list[subprocess.Popen[bytes]]") -> None:
    """Ends processes and forgets them."""
    _kill(processes)
    for process in processes:
        with suppress(BrokenPipeError), process:  # closing its pipes writes what is left in them
            process.wait()
    processes.clear()
