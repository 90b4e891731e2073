"""Runs one function in the processes of a torch process group, with Ray Train."""

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import Any

import ray
from ray.exceptions import RayError

from pipeline.cluster.connection import ClusterWatch, lost
from pipeline.cluster.mailbox import Throttled
from pipeline.cluster.ray_backend import POLL_S, new_mailbox
from pipeline.ui.streams import guard_streams
from storage.errors import PassingFailure, UserError, first_line

RUN_NAME = "ray-train"
"""Folder of Ray Train's own state, inside the one it is given."""

Work = Callable[[Callable[..., None], Callable[[], bool]], None]
"""Gets a function that sends a message to the driver, and one that says whether the driver was asked to stop."""


def run_group(
    work: Work,
    *,
    num_workers: int,
    gpus_per_worker: float,
    max_attempts: int,
    storage: str,
    on_message: Callable[..., None],
    should_stop: Callable[[], bool],
) -> None:
    """Runs a function in processes that form one torch process group, with Ray Train.

    Args:
        work: called once in each process.
        num_workers: processes.
        gpus_per_worker: GPUs each holds; 0 is one CPU each.
        max_attempts: times the whole group is started, the first included, when a process dies or meets a
            `PassingFailure`.
        storage: folder, seen by all nodes, for Ray Train's own state.
        on_message: called with each message.
        should_stop: asked a few times a second, as long as it says no.

    Raises:
        ClusterLost: If the cluster is gone.
        UserError: If `work` raised it (only a `PassingFailure` is tried again), or the group failed too often.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    mailbox = new_mailbox()
    trainer = TorchTrainer(
        _in_each_process(work, mailbox),
        train_loop_config={},
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=gpus_per_worker > 0,
            resources_per_worker={"GPU": gpus_per_worker} if gpus_per_worker else {"CPU": 1},
        ),
        run_config=RunConfig(
            name=RUN_NAME, storage_path=storage, failure_config=FailureConfig(max_failures=max_attempts - 1)
        ),
    )
    fitting, watch = _fitting(trainer), ClusterWatch()
    asked = ended = False
    try:
        while not ended:
            watch.just_answered()
            ended = bool(wait([fitting], POLL_S).done)
            for message in ray.get(mailbox.take.remote()):
                on_message(*message)
            if not asked and not ended and (asked := should_stop()):
                ray.get(mailbox.ask_to_stop.remote())
    except RayError as silence:  # the mailbox is on the head node
        raise lost(first_line(silence)) from silence
    error = ray.get(mailbox.error.remote())
    ray.kill(mailbox)
    if error is not None:
        raise error
    if isinstance(failure := fitting.exception(), ray.train.TrainingFailedError):
        raise UserError(f"the processes of the group failed {max_attempts} times, at last with: {failure}") from failure
    fitting.result()


def _fitting(trainer: Any) -> Future[Any]:
    """`fit` in a thread: in the main one it would take Ctrl-C for itself, and end without a checkpoint.

    The end of the process does not wait for it, as it waits without an end for a cluster that is lost.
    """
    fitting: Future[Any] = Future()

    def fit() -> None:
        try:
            fitting.set_result(trainer.fit())
        except BaseException as error:
            fitting.set_exception(error)

    Thread(target=fit, daemon=True).start()
    return fitting


def _in_each_process(work: Work, mailbox: Any) -> Callable[[Any], None]:
    def run(_: Any) -> None:
        guard_streams()
        if ray.get(mailbox.error.remote()) is not None:
            # The group was started again, but the error would be the same.
            return
        last_sent: list[Any] = []

        def send(*message: Any) -> None:
            last_sent[:] = [mailbox.put.remote(*message)]

        try:
            work(send, Throttled(lambda: bool(ray.get(mailbox.is_asked_to_stop.remote()))))
        except PassingFailure:
            raise
        except UserError as error:
            ray.get(mailbox.report_error.remote(error))
            # Raised, so that the other processes of the group, which may wait for this one, are ended.
            raise
        # Messages of one process arrive in order: with the last one all are there.
        ray.get(last_sent)

    return run
