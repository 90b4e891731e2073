"""Pictures of a model's visual attention: pooled maps laid over the image."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stages.student.data.batch import Batch
from stages.student.layer_matching import LayerMatching
from stages.student.losses.attention import below_sink_threshold, pool_keys
from stages.student.model.student import Student
from stages.student.training.forward import run_student

PICTURE_SIZE = 192
_WARM = (255, 90, 0)


@dataclass(frozen=True)
class PooledAttention:
    """Attention that each image token receives, without sinks, mean over the matched pairs; zero in the padding."""

    student_BN: Tensor
    teacher_BN: Tensor
    num_tokens_B: Tensor


@torch.inference_mode()
def pooled_attention(student: Student, batch: Batch, matching: LayerMatching) -> PooledAttention:
    """Pools the maps of student and teacher, each with its own sink mask.

    The student has capture enabled and is left in evaluation mode; the batch is on its device and has an image.
    """
    _, student_maps, windows = run_student(student.eval(), batch, matching)
    assert windows is not None
    num_tokens_B = windows.num_tokens_B
    student_keep = [below_sink_threshold(map_BNN, num_tokens_B) & (map_BNN > 0) for map_BNN in student_maps]
    student_BN, teacher_BN = (
        torch.stack([pool_keys(*pair) for pair in zip(maps, keep, strict=True)]).mean(0).cpu()
        for maps, keep in ((student_maps, student_keep), (windows.maps_WBNN, windows.keep_WBNN))
    )
    return PooledAttention(student_BN, teacher_BN, num_tokens_B.cpu())


def overlay(image: Image.Image, received_N: Tensor) -> Image.Image | None:
    """An RGB image darkened, and lit where attention goes; None when the tokens form no square grid.

    `received_N` is the attention that each image token receives, in row order.
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
