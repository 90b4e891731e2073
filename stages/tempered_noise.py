"""How noisy the logit loss is at temperatures other than 1, in a sentence for users."""

import torch
from torch import Tensor

from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.codecs.codec_settings import LogitCodecConfig


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
        f"are off by 0.1 (at temperature 1 {10 * usual:.2g} times). Larger ones in the teacher's settings lower it; "
        "the kd_divergences other than forward use no tail samples (docs/codecs.md#temperatures-above-1)"
        for temperature in temperatures
        if (noise := stored.gradient_noise(temperature)) > usual
    )
