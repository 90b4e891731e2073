"""Students of a sweep that are trained at the same time, each in a process of its own.

A small student keeps neither a GPU nor the cores of a CPU busy: two threads may train one no faster than one thread
(docs/training.md#what-a-step-costs).
"""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any

import torch

from pipeline.run_file import RunFile
from pipeline.runtime.interruption import RESUME, SAVED_EXIT_CODE, Interrupted, remembered
from pipeline.sweep import Training
from pipeline.sweep_file import Sweep
from pipeline.training import train
from pipeline.ui.progress import NamedProgress
from stages.student.run_folder import StageReport
from storage.errors import StoreUnavailable, UserError
from storage.progress import Progress, ProgressTask

logger = logging.getLogger(__name__)


@contextmanager
def students_at_once(
    sweep: Sweep, at_once: int, progress: Progress, *, resume: bool = True
) -> Iterator[Mapping[str, Training]]:
    """Trains students in the background of the block, `at_once` of them at a time, in their order.

    Each has an equal part of the cores, and one GPU where there are some. A request to stop (SIGTERM, Ctrl-C) goes to
    all of them; they save a checkpoint. So it does if the block ends early. Only the main thread may do this.

    Yields:
        For each student what waits for its training and gives a report of each stage. It raises `UserError`, also if
        the process ends otherwise, `StoreUnavailable`, or `Interrupted`.
    """
    processes = _Processes(at_once, progress, resume=resume)
    before = {number: signal.signal(number, processes.pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    pool = ThreadPoolExecutor(at_once)
    try:
        yield {name: pool.submit(processes.train, name, run).result for name, run in sweep.runs.items()}
    finally:
        processes.stop()
        pool.shutdown(cancel_futures=True)
        for number, handler in before.items():
            signal.signal(number, handler)


class _Processes:
    """Those that train now; each call of `train` begins one, from a thread that waits for it."""

    def __init__(self, at_once: int, progress: Progress, *, resume: bool) -> None:
        self._progress, self._resume = progress, resume
        self._threads = max(1, torch.get_num_threads() // at_once)
        self._devices: list[str | None] = [*_visible_gpus()] or [None]
        self._num_on = [0] * len(self._devices)
        self._running: set[SpawnProcess] = set()
        self._lock = threading.Lock()
        self._stopping = False

    def train(self, name: str, run: RunFile) -> list[StageReport]:
        here, there = multiprocessing.Pipe(duplex=False)
        with self._lock:
            if self._stopping:
                raise _stopped()
            slot = self._num_on.index(min(self._num_on))
            given = (run.model_dump_json(), self._threads, self._devices[slot], self._resume, there)
            # No daemon: it has loader processes of its own.
            process = multiprocessing.get_context("spawn").Process(target=_train_here, args=given)
            process.start()
            self._num_on[slot] += 1
            self._running.add(process)
        there.close()
        try:
            return _followed(here, NamedProgress(name, self._progress))
        except EOFError:
            process.join()
            if self._stopping:
                raise _stopped() from None
            raise UserError(_end_of(process.exitcode or 0)) from None
        finally:
            process.join()
            with self._lock:
                self._num_on[slot] -= 1
                self._running.remove(process)

    def pass_on(self, *_: int | FrameType | None) -> None:
        """A handler of signals: asks all processes to stop."""
        self.stop()

    def stop(self) -> None:
        """Asks those that train to save a checkpoint and end; no other begins."""
        self._stopping = True
        for process in list(self._running):
            process.terminate()


def _stopped() -> Interrupted:
    return Interrupted(signal.SIGTERM, f"stopped; {RESUME}", SAVED_EXIT_CODE)


def _visible_gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


def _end_of(exit_code: int) -> str:
    how = f"was ended by signal {-exit_code}" if exit_code < 0 else f"ended with exit code {exit_code}"
    return (
        f"its process {how} and did not say why; if memory ran out, train fewer students at once, or lower "
        "train.loader.microbatch_size"
    )


def _followed(said: Connection, progress: Progress) -> list[StageReport]:
    """Shows what a process says until it says what came of its training; EOFError if it ends before."""
    tasks: dict[int, ProgressTask] = {}
    while True:
        match said.recv():
            case ("task", number, name, total, unit, detail):
                tasks[number] = progress.task(name, total, unit, detail=detail)
            case ("of task", number, method, given):
                getattr(tasks[number], method)(**given)
            case ("message", text):
                progress.message(text)
            case ("reports", reports):
                return [StageReport.model_validate(report) for report in reports]
            case ("failed", error):
                raise error


def _train_here(settings: str, num_threads: int, device: str | None, resume: bool, there: Connection) -> None:
    """Trains in this process and sends what is to be shown, at last the reports or what stopped it."""
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    torch.set_num_threads(num_threads)
    run = RunFile.model_validate_json(settings)
    try:
        with remembered(signal.SIGTERM, signal.SIGINT) as asked_to_stop:
            reports = train(run, run.train.stages, _Sent(there), asked_to_stop, resume=resume)
        there.send(("reports", [report.model_dump(mode="json") for report in reports]))
    except Interrupted as stop:
        there.send(("failed", Interrupted(stop.signal_number, str(stop), stop.exit_code)))
    except StoreUnavailable as error:
        there.send(("failed", StoreUnavailable(str(error))))
    except UserError as error:
        there.send(("failed", UserError(str(error))))
    except Exception as error:
        logger.exception("training failed")
        there.send(("failed", UserError(f"{type(error).__name__}: {error}")))


class _Sent:
    """A `Progress` that the process at the other end shows."""

    def __init__(self, there: Connection) -> None:
        self._there, self._numbers = there, count()

    def task(
        self, name: str, total: float | None = None, unit: str = "samples", *, detail: bool = False
    ) -> ProgressTask:
        number = next(self._numbers)
        self._there.send(("task", number, name, total, unit, detail))
        return _SentTask(self._there, number)

    def message(self, text: str) -> None:
        self._there.send(("message", text))


class _SentTask:
    def __init__(self, there: Connection, number: int) -> None:
        self._there, self._number = there, number

    def advance(self, amount: float = 1) -> None:
        self._send("advance", amount=amount)

    def update(self, **said: Any) -> None:
        self._send("update", **said)

    def remove(self) -> None:
        self._send("remove")

    def _send(self, method: str, **given: Any) -> None:
        self._there.send(("of task", self._number, method, given))
