"""Pictures of where a model looks: pooled attention laid over the image.

Shape letters: B samples, N image tokens, W matched pairs.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stages.student.data.batch import Batch, capture_for, decode_windows
from stages.student.layer_matching import LayerMatching
from stages.student.losses import below_sink_threshold, pool_keys
from stages.student.model.build import Student

PICTURE_SIZE = 192
_WARM = (255, 90, 0)


@dataclass(frozen=True)
class Gaze:
    """Attention that each image token receives, sinks left out, mean over the matched pairs.

    Attributes:
        student_BN, teacher_BN: `[B, N]`, zero beyond a sample's own tokens.
        num_tokens_B: image tokens of each sample.
    """

    student_BN: Tensor
    teacher_BN: Tensor
    num_tokens_B: Tensor


@torch.inference_mode()
def gaze(student: Student, batch: Batch, matching: LayerMatching) -> Gaze:
    """Where student and teacher look in a batch; each side by its own sink mask.

    Args:
        student: with capture enabled; left in evaluation mode.
        batch: on the student's device.
        matching: which layers are compared.
    """
    student.eval()
    capture = capture_for(batch, matching.student_layers, student.device)
    student.model(**batch.inputs, capture=capture, use_cache=False)
    targets = decode_windows(batch.maps, matching, student.device)
    counts_B = targets.num_tokens_B
    own = [capture.maps[layer] for layer in matching.student_layers]
    student_BN = torch.stack([pool_keys(m, below_sink_threshold(m, counts_B) & (m > 0)) for m in own]).mean(0)
    teacher_BN = torch.stack(
        [pool_keys(m, keep) for m, keep in zip(targets.maps_WBNN, targets.keep_WBNN, strict=True)]
    ).mean(0)
    return Gaze(student_BN.cpu(), teacher_BN.cpu(), counts_B.cpu())


def overlay(image: Image.Image, received_N: Tensor) -> Image.Image | None:
    """`image` darkened, and lit where attention goes; None when the tokens are no square grid.

    Args:
        image: RGB, any size.
        received_N: attention each image token receives, in row order.
    """
    side = math.isqrt(len(received_N))
    if side * side != len(received_N) or not side:
        return None
    heat = received_N.reshape(side, side).float()
    levels = (heat / heat.max().clamp(min=1e-12) * 255).round().to(torch.uint8).numpy()
    size = (PICTURE_SIZE, PICTURE_SIZE)
    mask = Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC)
    base = Image.fromarray((np.asarray(enlarged(image)) * 0.45).astype(np.uint8))
    return Image.composite(Image.blend(base, Image.new("RGB", size, _WARM), 0.75), base, mask)


def enlarged(image: Image.Image) -> Image.Image:
    """The image at the pictures' size; small ones keep their pixels visible."""
    small = max(image.size) < PICTURE_SIZE
    return image.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)
