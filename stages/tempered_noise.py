"""How noisy the logit loss is at temperatures other than 1, in a sentence for users."""

import math

import torch
from torch import Tensor

from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.codec_settings import LogitCodecConfig, default_num_levels


def noise_notes(codec: LogitCodecConfig, records: list[Tensor], temperatures: tuple[float, ...]) -> tuple[str, ...]:
    """A note for each of the stored temperatures at which the gradient is noisier than at temperature 1.

    `records` are `[R, Q]` answer rows of some samples. There is no note without a row, or with the whole vocabulary.
    """
    if not codec.num_sampled or not sum(map(len, records)):
        return ()
    stored = AnswerLogitsCodec(codec).decode(torch.cat(records))
    usual = stored.gradient_noise()
    return tuple(
        f"at temperature {temperature:g} the logit loss is noisy: with top_k {codec.num_kept} and tempered_samples "
        f"{codec.num_tempered}, tail samples add {10 * noise:.2g} times a row's gradient for a student whose logits "
        f"are off by 0.1 (at temperature 1 {10 * usual:.2g} times). {_remedy(codec, noise, usual)}; the kd_divergences "
        "other than forward use no tail samples (docs/codecs.md#temperatures-above-1)"
        for temperature in temperatures
        if (noise := stored.gradient_noise(temperature)) > usual
    )


def _remedy(codec: LogitCodecConfig, noise: float, usual: float) -> str:
    """The setting with the smallest records that brings this noise to the usual one: more samples, or all tokens."""
    whole = {
        "top_k": codec.vocab_size,
        "num_levels": default_num_levels(codec.vocab_size, codec.vocab_size, codec.temperatures),
    }
    setting, smallest = f"teacher.top_k={codec.vocab_size}", codec.model_copy(update=whole)
    # Noise falls as the root of the number of samples.
    if usual and (more := math.ceil(codec.num_tempered * (noise / usual) ** 2)) <= codec.vocab_size:
        sampled = codec.model_copy(update={"num_tempered_samples": more})
        if sampled.row_bytes < smallest.row_bytes:
            setting, smallest = f"teacher.tempered_samples={more}", sampled
    sizes = f"{smallest.row_bytes:,} bytes a row, now {codec.row_bytes:,}"
    return f"For no more than that, extract with {setting} ({sizes})"
