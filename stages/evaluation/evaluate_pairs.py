"""Evaluates a model on a suite of caption pairs."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from stages.checkpoints.image_settings import image_settings
from stages.checkpoints.processors import image_processor_backend
from stages.conversations.encoder import NO_LIMIT, ConversationEncoder
from stages.evaluation import scoring
from stages.evaluation.caption_pairs import CaptionPair
from stages.evaluation.config import EvaluationConfig
from stages.evaluation.logprobs import RowReader
from stages.evaluation.report import EvaluationReport, KindResult
from storage.errors import UserError
from storage.progress import SILENT, Progress
from storage.samples.image_settings import DEFAULT_IMAGES, ImageConfig

_Z_95: Final = 1.959963984540054


def evaluate_pairs(
    model: Any,
    processor: Any,
    pairs: Mapping[str, Sequence[CaptionPair]],
    config: EvaluationConfig,
    progress: Progress = SILENT,
    title: str = "evaluate",
    images: ImageConfig = DEFAULT_IMAGES,
) -> EvaluationReport:
    """Scores all pairs and sums up by kind.

    The model is any of `AutoModelForImageTextToText`, on its device; it is left in the mode it came in. Pictures are
    read as its config says, or as `images` where it says nothing.

    Raises:
        UserError: If a kind has no pairs, a pair cannot be encoded, the model cannot be read row by row, or scores are
            not finite.
    """
    if empty := [kind for kind, of_kind in pairs.items() if not of_kind]:
        raise UserError(f"no pairs of kind {', '.join(empty)}")
    if not pairs:
        raise UserError("no pairs to evaluate")
    images = image_settings(model.config) or images
    encoder = ConversationEncoder(processor, model.config.image_token_id, NO_LIMIT, images=images)
    score = scoring.likelihood_scores if config.scoring == "likelihood" else scoring.letter_scores
    task = progress.task(title, sum(map(len, pairs.values())), unit="pairs")
    was_training = model.training
    model.eval()
    start = time.perf_counter()
    try:
        with torch.inference_mode():
            RowReader(model).check_head(encoder.encode_prompt(config.prompt, []))
            results = {kind: _sum_up(score(model, encoder, of_kind, config, task)) for kind, of_kind in pairs.items()}
    finally:
        model.train(was_training)
    seconds = time.perf_counter() - start
    num_pairs = sum(result.num_pairs for result in results.values())
    return EvaluationReport(
        model=model.name_or_path,
        dtype=str(model.dtype).removeprefix("torch."),
        image_backend=image_processor_backend(processor),
        images=images,
        scoring=config.scoring,
        prompt=config.prompt if config.scoring == "likelihood" else config.letter_prompt,
        kinds=results,
        average=sum(result.accuracy for result in results.values()) / len(results),
        num_pairs=num_pairs,
        seconds=seconds,
        pairs_per_s=num_pairs / seconds,
    )


def wilson_interval(successes: float, num_trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion.

    A tie counts as half a success.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if num_trials < 1 or not 0 <= successes <= num_trials:
        raise ValueError(f"{successes} successes of {num_trials} trials")
    share, z2 = successes / num_trials, _Z_95**2
    center = (share + z2 / (2 * num_trials)) / (1 + z2 / num_trials)
    spread = math.sqrt(share * (1 - share) / num_trials + z2 / (4 * num_trials**2))
    half = _Z_95 * spread / (1 + z2 / num_trials)
    return max(0.0, center - half), min(1.0, center + half)


def _sum_up(scores: Tensor) -> KindResult:
    """The result on one kind from its scores."""
    counted = scoring.count_pairs(scores)
    return KindResult(
        num_pairs=len(counted),
        accuracy=float(counted.mean()),
        interval_95=wilson_interval(float(counted.sum()), len(counted)),
        first_letter_share=scoring.share_of_first_letter(scores) if scores.ndim == 3 else None,
    )
