"""Spreads a suite's items over the workers of a Ray cluster."""

from collections.abc import Callable
from functools import partial

from pipeline.cluster import connection, ray_backend
from pipeline.models import load_model
from stages.evaluation.answering.answerer import Answerer
from stages.evaluation.answering.config import AnsweringConfig
from stages.evaluation.config import EvaluationConfig, SuiteConfig
from stages.evaluation.loaded_suite import load_suite
from stages.evaluation.result import ItemsFile, SuiteRun, items_digest
from stages.evaluation.run_suite import ask_chunk, chunks_of
from storage.errors import UserError
from storage.progress import ProgressTask
from storage.samples.image_settings import ImageConfig

MAX_ATTEMPTS = 3


def ask_on_ray(
    model: str,
    suite: SuiteConfig,
    run: SuiteRun,
    config: EvaluationConfig,
    reading: ImageConfig,
    chunks: list[int],
    items: ItemsFile,
    task: ProgressTask,
) -> None:
    """Has chunks of a suite answered by `config.num_workers` workers, and saves answers as they come.

    Raises:
        UserError: If a chunk failed on every attempt; the others are saved.
    """
    with connection.connect(config.ray_address) as cluster:
        outcome = ray_backend.run_tasks(
            partial(SuiteWorker, model, suite, run, config, reading),
            chunks,
            ray_backend.TaskLimits(
                num_workers=config.num_workers, gpus_per_worker=1 if cluster.gpus else 0, max_attempts=MAX_ATTEMPTS
            ),
            on_progress=lambda _, count: task.advance(count),
            on_result=lambda _, lines: items.append(lines),
        )
    if outcome.failures:
        found = f"{len(outcome.failures)} of {len(chunks)} parts of {run.suite} were given up"
        raise UserError(f"{found}: {next(iter(outcome.failures.values()))}; run the command again for the rest")


class SuiteWorker:
    """One worker of an evaluation on a cluster: answers chunks of a suite's items, as lines to save.

    Raises:
        UserError: If its machine has another suite than the command's.
    """

    def __init__(
        self, model: str, suite: SuiteConfig, run: SuiteRun, config: AnsweringConfig, reading: ImageConfig
    ) -> None:
        self._suite = load_suite(run.suite, suite)
        if items_digest(self._suite.all_items) != run.items:
            raise UserError(
                f"a worker sees other items of {run.suite} in {suite.data} than the command; give all the same"
            )
        self._chunks = chunks_of(self._suite.items)
        self._answerer = Answerer(*load_model(model), config, reading, blank=suite.blind)

    def __call__(self, chunk: int, progress: Callable[[int], None]) -> str:
        """The answered items of a chunk."""
        lines = ask_chunk(self._answerer, self._suite, self._chunks[chunk])
        progress(len(self._chunks[chunk]))
        return lines
