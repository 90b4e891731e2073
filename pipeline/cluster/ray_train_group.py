"""Runs one function in the processes of a torch process group, with Ray Train."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import ray

from pipeline.cluster.mailbox import Throttled
from pipeline.cluster.ray_backend import POLL_S, new_mailbox
from pipeline.ui.streams import guard_streams
from storage.errors import PassingFailure, UserError

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
    # Beside this thread: in the main one it would take Ctrl-C for itself, and end without a checkpoint.
    with ThreadPoolExecutor(1) as beside:
        fitting = beside.submit(trainer.fit)
        asked = ended = False
        while not ended:
            ended = bool(wait([fitting], POLL_S).done)
            for message in ray.get(mailbox.take.remote()):
                on_message(*message)
            if not asked and not ended and (asked := should_stop()):
                ray.get(mailbox.ask_to_stop.remote())
    error = ray.get(mailbox.error.remote())
    ray.kill(mailbox)
    if error is not None:
        raise error
    if isinstance(failure := fitting.exception(), ray.train.TrainingFailedError):
        raise UserError(f"the processes of the group failed {max_attempts} times, at last with: {failure}") from failure
    fitting.result()


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
