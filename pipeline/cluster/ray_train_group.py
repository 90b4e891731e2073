"""Running one function in the processes of a torch process group, with Ray Train."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import ray

from pipeline.cluster.mailbox import Throttled
from pipeline.cluster.ray_backend import POLL_S, new_mailbox
from storage.errors import PassingFailure, UserError

NOTES = "ray-train"
"""Folder that Ray Train keeps its own notes in, inside the one it is given."""


def run_group(
    work: Callable[[Callable[..., None], Callable[[], bool]], None],
    *,
    num_workers: int,
    gpus_per_worker: float,
    max_attempts: int,
    storage: str,
    on_letter: Callable[..., None],
    should_stop: Callable[[], bool],
) -> None:
    """Runs a function in processes that form one torch process group, with Ray Train.

    Args:
        work: called once in each process, with a function that sends a letter to the driver, and one that says
            whether the driver was asked to stop.
        num_workers: processes.
        gpus_per_worker: GPUs each holds; 0 is one CPU each.
        max_attempts: times the whole group is started, the first included, when a process dies or meets a
            `PassingFailure`.
        storage: folder, seen by all nodes, that Ray Train keeps its own notes in.
        on_letter: called with what was sent.
        should_stop: asked a few times a second, as long as it says no.

    Raises:
        UserError: one that `work` raised; it is not tried again, but for a `PassingFailure`. Or the group failed too
            often.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    mailbox = new_mailbox()

    def in_each_process(_: dict[str, Any]) -> None:
        if ray.get(mailbox.has_mistake.remote()):
            # Started again, but it would be the same.
            return
        last_sent: list[Any] = []

        def send(*letter: Any) -> None:
            last_sent[:] = [mailbox.put.remote(*letter)]

        try:
            work(send, Throttled(lambda: bool(ray.get(mailbox.is_asked_to_stop.remote()))))
        except PassingFailure:
            raise
        except UserError as error:
            ray.get(mailbox.report_mistake.remote(error))
            # So that the others of the group, which may wait for this process, are ended.
            raise
        # Letters of one process arrive in order: with the last one all are there.
        ray.get(last_sent)

    trainer = TorchTrainer(
        in_each_process,
        train_loop_config={},
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=gpus_per_worker > 0,
            resources_per_worker={"GPU": gpus_per_worker} if gpus_per_worker else {"CPU": 1},
        ),
        run_config=RunConfig(
            name=NOTES, storage_path=storage, failure_config=FailureConfig(max_failures=max_attempts - 1)
        ),
    )
    # Beside this thread: in the main one it would take Ctrl-C for itself, and end without a checkpoint.
    with ThreadPoolExecutor(1) as beside:
        fitting = beside.submit(trainer.fit)
        asked = False
        while not fitting.done():
            wait([fitting], POLL_S)
            for letter in ray.get(mailbox.take.remote()):
                on_letter(*letter)
            if not asked and (asked := should_stop()):
                ray.get(mailbox.ask_to_stop.remote())
    for letter in ray.get(mailbox.take.remote()):
        on_letter(*letter)
    mistake = ray.get(mailbox.mistake.remote())
    ray.kill(mailbox)
    if mistake is not None:
        raise mistake
    if isinstance(error := fitting.exception(), ray.train.TrainingFailedError):
        raise UserError(f"the processes of the group failed {max_attempts} times, at last with: {error}") from error
    fitting.result()
