"""The models that lmms-eval runs: thin classes over `PromptedModel`."""

import inspect
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import groupby
from typing import Any

import torch
from lmms_eval import evaluator, utils
from lmms_eval.api.model import lmms
from lmms_eval.api.task import ConfigurableTask
from loguru import logger
from tqdm import tqdm

from pipeline.lmms_eval.requests import decoding_of, prompt_of_text
from pipeline.models import default_device, load_model
from stages.evaluation.harness.prompted_model import DecodingConfig, PromptedModel
from stages.evaluation.harness.prompts import Prompt, to_prompt
from storage.errors import UserError


class _Model(lmms):
    """A checkpoint, a training run's student or an export, on one device a process.

    Args:
        pretrained: Folder of a training run, folder of a checkpoint, or hub id.
        batch_size: Prompts that go through the model together.
        device: Such as `cpu`; by default the GPU of this process, if there is one.

    Raises:
        UserError: As `load_model`, or if `batch_size` is no number.
    """

    def __init__(self, pretrained: str, batch_size: int | str = 1, device: str | None = None) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch_size is {batch_size!r}; expected a number of prompts, such as --batch_size 8")
        self.device = _device(device)
        self._model = PromptedModel(*load_model(str(pretrained), self.device), int(batch_size))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "_Model":
        """The model of `--model_args`; these win over flags, which have defaults."""
        flags = {name: value for name, value in (additional_config or {}).items() if value is not None}
        flags.pop("max_batch_size", None)
        return cls(**{**flags, **utils.simple_parse_args_string(arg_string)})

    @property
    def batch_size(self) -> int:
        """Prompts that go through the model together."""
        return self._model.batch_size

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers to the prompts of the requests, in their order."""
        _warn_of_unread({request.task_name: self._generation_settings(request) for request in requests})
        answers: list[str] = []
        with tqdm(total=len(requests), desc="cdp", disable=self.rank != 0) as bar:
            for decoding, alike in groupby(requests, key=self._decoding):
                for answer in self._model.generate(map(self._prompt, alike), decoding):
                    answers.append(answer)
                    bar.update()
        return answers

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Is refused."""
        raise UserError("tasks of several rounds are not supported; choose a task of output_type generate_until")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Is refused: lmms-eval knows such tasks for models of the simple kind only."""
        raise UserError("tasks of likelihoods are for models of the simple kind; add --force_simple")

    def clean(self) -> None:
        """Frees the model, before a judge may be loaded."""
        del self._model
        super().clean()

    def _decoding(self, request: Any) -> DecodingConfig:
        return decoding_of(self._generation_settings(request))[0]

    def _document(self, request: Any) -> Any:
        *_, document, task, split = request.args
        return self.task_dict[task][split][document]

    def _prompt(self, request: Any) -> Prompt:
        raise NotImplementedError

    def _generation_settings(self, request: Any) -> dict[str, Any]:
        raise NotImplementedError


class ChatModel(_Model):
    """Takes messages: what `--model cdp` is."""

    is_simple = False

    def _prompt(self, request: Any) -> Prompt:
        _, doc_to_messages, *_ = request.args
        return to_prompt(_name(request), doc_to_messages(self._document(request)))

    def _generation_settings(self, request: Any) -> dict[str, Any]:
        return dict(request.args[2])


class SimpleModel(_Model):
    """Takes a text and its pictures: `--model cdp --force_simple`, which tasks of likelihoods need."""

    is_simple = True

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-probability of each answer and whether greedy decoding gives it, in the order of the requests.

        For a choice of several it has the sign that the task expects.

        Raises:
            UserError: If this version of lmms-eval could not read them.
        """
        _check_likelihoods_are_read()
        scores: list[tuple[float, bool]] = []
        with tqdm(total=len(requests), desc="cdp", disable=self.rank != 0) as bar:
            for answers in self._model.scores(self._questions(requests)):
                scores += answers
                bar.update(len(answers))
        signs = (_sign_of_choice() if isinstance(request.args[1], str) else 1 for request in requests)
        return [(sign * log_prob, is_greedy) for sign, (log_prob, is_greedy) in zip(signs, scores, strict=True)]

    def _questions(self, requests: Sequence[Any]) -> Iterator[tuple[Prompt, list[str]]]:
        """Prompts with all their answers, so that a picture is decoded once for several."""
        for _, alike in groupby(requests, key=lambda request: (request.args[0], *request.args[3:])):
            together = list(alike)
            yield self._prompt(together[0]), [self._answer(request) for request in together]

    def _answer(self, request: Any) -> str:
        answer = request.args[1]
        # What stands before an answer is the chat template's.
        return str(answer if isinstance(answer, str) else answer(self._document(request))).strip()

    def _prompt(self, request: Any) -> Prompt:
        text, _, doc_to_visual, *_ = request.args
        return prompt_of_text(_name(request), text, doc_to_visual(self._document(request)))

    def _generation_settings(self, request: Any) -> dict[str, Any]:
        return dict(request.args[1])


def _name(request: Any) -> str:
    return f"document {request.doc_id} of {request.task_name}"


def _warn_of_unread(settings_of_task: dict[str, dict[str, Any]]) -> None:
    for task, settings in settings_of_task.items():
        if unread := decoding_of(settings)[1]:
            logger.warning(f"generation settings of {task} that are not read: {', '.join(unread)}")


def _device(name: str | None) -> torch.device:
    """The device of this process: of several GPUs the one of its rank on the machine."""
    kind = name or default_device().type
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if kind == "cuda" else kind)


def _check_likelihoods_are_read() -> None:
    """Refuses before the work what lmms-eval 0.7.3 does with the pairs of every model: it makes texts of them."""
    if not isinstance(evaluator.unwrap_generation_output((0.0, True))[0], tuple):
        found = f"lmms-eval {version('lmms-eval')} makes texts of likelihoods and then cannot score them"
        raise UserError(f"{found}; choose a task of output_type generate_until, or score pairs with `cdp evaluate`")


def _sign_of_choice() -> int:
    """-1 where tasks take the choice with the least number, as of losses: lmms-eval 0.7.3 does, against its own text.

    Raises:
        UserError: If this version does neither.
    """
    source = inspect.getsource(ConfigurableTask.process_results)
    signs = [sign for sign, call in ((-1, "np.argmin(lls)"), (1, "np.argmax(lls)")) if call in source]
    if len(signs) != 1:
        raise UserError("this version of lmms-eval does not say which choice it takes; use 0.7.3, or a task of answers")
    return signs[0]
