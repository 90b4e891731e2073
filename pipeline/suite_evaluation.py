"""Asks a checkpoint suites: in this process, in those of torchrun, or in workers of a Ray cluster."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

from pipeline.checkpoints import find_checkpoint
from pipeline.models import computing_dtype, load_model
from stages.checkpoints.image_settings import image_settings
from stages.checkpoints.processors import hide_loading_bars, image_processor_backend, load_processor
from stages.checkpoints.weights import weights_digest
from stages.evaluation.answered_items import AnsweredItem, item_line, read_items
from stages.evaluation.answering.answerer import Answerer
from stages.evaluation.answering.encoding import check_words
from stages.evaluation.config import EvaluationConfig
from stages.evaluation.loaded_suite import LoadedSuite
from stages.evaluation.metrics import scored
from stages.evaluation.result import (
    RESULT_FILE,
    ItemsFile,
    SuiteResult,
    SuiteRun,
    begun_items,
    items_digest,
    make_result,
    write_server_files,
)
from stages.evaluation.run_suite import ask_chunk, chunks_of
from stages.evaluation.suites.suite import Item
from stages.student.model.loading import multimodal_config
from storage.errors import UserError
from storage.progress import SILENT, Progress, ProgressTask
from storage.samples.image_settings import DEFAULT_IMAGES, ImageConfig
from storage.stores import open_store

POLL_S: Final = 1.0


class ProcessGroup(NamedTuple):
    """This process among those that torchrun started."""

    rank: int
    size: int

    @classmethod
    def from_environment(cls) -> "ProcessGroup":
        """Alone where there is no torchrun."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def evaluate_suites(
    model: str,
    suites: Mapping[str, LoadedSuite],
    config: EvaluationConfig,
    output: Path,
    progress: Progress = SILENT,
    reading: ImageConfig = DEFAULT_IMAGES,
    *,
    replace: bool = False,
    finished: Callable[[SuiteResult], None] = lambda result: None,
) -> dict[str, SuiteResult]:
    """Asks a checkpoint all suites, each into its folder of `output`; goes on where an earlier command stopped.

    What was answered is not asked again, so that a finished suite is only summed up. `reading` is for a checkpoint that
    does not say how it reads pictures. With `replace`, answers of another run are removed, else they are an error.
    Under torchrun each process answers its share; only the first gets results. `finished` is called with the result of
    each suite before the next one is asked.

    Raises:
        UserError: If a suite's folder or the checkpoint cannot be used, or the folder holds answers of another run.
    """
    asker = _Asker(model, config, reading, progress)
    for name, suite in suites.items():
        asker.check(name, suite)
    results = {}
    for name, suite in suites.items():
        if (result := asker.result(name, suite, output / name, replace=replace)) is not None:
            results[name] = result
            finished(result)
    return results


class _Asker:
    """Asks one checkpoint; its weights are loaded when the first item is asked."""

    def __init__(
        self,
        model: str,
        config: EvaluationConfig,
        reading: ImageConfig,
        progress: Progress,
    ) -> None:
        hide_loading_bars()
        self.model, self.config, self.reading, self.progress = model, config, reading, progress
        self.folder, self.group = find_checkpoint(model), ProcessGroup.from_environment()
        # What every suite's answers are of, read once.
        self._weights = weights_digest(self.folder)
        # The config first: it makes students known, of whose type the processor's loading would warn otherwise.
        self._images = image_settings(multimodal_config(self.folder)) or reading
        processor = load_processor(self.folder)
        self._tokenizer, self._image_backend = processor.tokenizer, image_processor_backend(processor)

    def check(self, name: str, suite: LoadedSuite) -> None:
        """Checks what can be known before the model is loaded: that its tokenizer has the answers that are compared.

        Raises:
            UserError: If it has not.
        """
        check_suite_words(self._tokenizer, name, suite)

    def result(self, name: str, suite: LoadedSuite, folder: Path, *, replace: bool) -> SuiteResult | None:
        """The result of a suite once all its items are answered; None in processes other than the first."""
        run = self._run(name, suite)
        rank, size = self.group
        with begun_items(folder, run, rank, replace=replace) as items:
            chunks = [(number, _unanswered(chunk, items)) for number, chunk in enumerate(chunks_of(suite.items))]
            left = sum(len(chunk) for _, chunk in chunks)
            own = [chunk for number, chunk in chunks if chunk and number % size == rank]
            # Before the clock starts, which measures answering.
            answerer = self._answerer if own and self.config.num_workers is None else None
            task = self.progress.task(f"{name} {Path(self.model).name}", len(suite.items), unit="items")
            task.update(done=len(suite.items) - left)
            start = time.perf_counter()
            if answerer is not None:
                answerer.blank = suite.config.blind
                for chunk in own:
                    items.append(ask_chunk(answerer, suite, chunk))
                    task.advance(len(chunk))
            elif own:
                self._ask_on_ray(suite, run, [number for number, chunk in chunks if chunk], items, task)
            if rank > 0:
                return None
            saved = _wait_for_all(suite, folder, task)
            answered = [_counted(suite, item, saved[item.id]) for item in suite.items]
            if any(one.scored != saved[one.id].scored for one in answered):
                # Another version counted them; `cdp compare` reads what is saved.
                lines = [
                    item_line(item, one.answers, one.scored.counts, [asked.pictures for asked in one.questions])
                    for item, one in zip(suite.items, answered, strict=True)
                ]
                items.replace_all("".join(f"{line}\n" for line in lines))
            seconds = time.perf_counter() - start
        result = make_result(run, answered, suite.missing, self.config.num_resamples, seconds, left)
        open_store(folder).write(RESULT_FILE, result.to_json().encode())
        for path in write_server_files(folder, run.suite, answered):
            self.progress.message(f"wrote {path} for the server of {name}'s makers, which alone has the labels")
        return result

    @cached_property
    def _answerer(self) -> Answerer:
        """Made for the first suite that has something to ask, and tried once for all."""
        answerer = Answerer(*load_model(self.model), self.config, self.reading)
        for note in answerer.notes:
            self.progress.message(f"note: {note}")
        return answerer

    def _run(self, name: str, suite: LoadedSuite) -> SuiteRun:
        return SuiteRun(
            suite=name,
            protocol=suite.protocol,
            blind=suite.config.blind,
            items=items_digest(suite.all_items),
            model=self.model,
            weights=self._weights,
            dtype=str(computing_dtype()).removeprefix("torch."),
            image_backend=self._image_backend,
            images=self._images,
            num_items=len(suite.all_items),
            limit=suite.config.limit,
        )

    def _ask_on_ray(
        self, suite: LoadedSuite, run: SuiteRun, chunks: list[int], items: ItemsFile, task: ProgressTask
    ) -> None:
        from pipeline.suites_on_ray import ask_on_ray

        if self.group.size > 1:
            raise UserError("evaluate.num_workers starts workers of Ray, and torchrun started processes; take one")
        ask_on_ray(self.model, suite.config, run, self.config, self.reading, chunks, items, task)


def check_suite_words(tokenizer: Any, name: str, suite: LoadedSuite) -> None:
    """Checks that a tokenizer has the answers that a suite compares by their first tokens.

    Raises:
        UserError: If it has not; names suite and protocol.
    """
    try:
        check_words(tokenizer, (question for item in suite.items for question in item.questions))
    except UserError as error:
        raise UserError(f"{name} by {suite.protocol}: {error}") from None


def _counted(suite: LoadedSuite, item: Item, saved: AnsweredItem) -> AnsweredItem:
    return saved._replace(scored=scored(item, suite.suite.count(item, saved.answers, suite.protocol)))


def _unanswered(chunk: Sequence[Item], items: ItemsFile) -> list[Item]:
    return [item for item in chunk if item.id not in items.answered]


def _wait_for_all(suite: LoadedSuite, folder: Path, task: ProgressTask) -> dict[str, AnsweredItem]:
    """All answers by their items' ids; those of other processes are waited for.

    torchrun ends all processes if one fails.
    """
    while True:
        answered = read_items(folder)
        task.update(done=len(answered))
        if all(item.id in answered for item in suite.items):
            return answered
        time.sleep(POLL_S)
