"""What a model of a family is called with for several samples at once."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from stages.checkpoints.processor_sizes import check_picture
from stages.families.family import Family
from storage.errors import UserError


def batch_inputs(
    family: Family,
    image_token_id: int,
    token_ids: Sequence[Tensor],
    pixel_inputs: Sequence[Mapping[str, Tensor]],
    *,
    multiple: int = 1,
    pad_left: bool = False,
) -> dict[str, Tensor]:
    """The model's inputs: tokens padded right, or left as generation needs it; pixels of the samples that have any.

    T is rounded up to a multiple of `multiple`. The pixel inputs of a sample without an image are empty.

    Returns:
        `input_ids` and `attention_mask` `[B, T]`, for some families where images are `[B, T]`, and the pixels. Padded
        ids are never attended to and never read.

    Raises:
        UserError: If the processor made an input that the family does not name.
    """
    longest = max((len(ids) for ids in token_ids), default=1)
    width = -(-longest // multiple) * multiple
    # Any id but the image token, which models count.
    padding = 1 if image_token_id == 0 else 0
    input_ids = torch.full((len(token_ids), width), padding, dtype=torch.long)
    attention_mask = torch.zeros(len(token_ids), width, dtype=torch.long)
    for row, ids in enumerate(token_ids):
        start = width - len(ids) if pad_left else 0
        input_ids[row, start : start + len(ids)] = ids
        attention_mask[row, start : start + len(ids)] = 1
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if family.modality_input is not None:
        inputs[family.modality_input] = (input_ids == image_token_id).long()
    return {**inputs, **join_pixels(family, pixel_inputs)}


def move_inputs(inputs: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The inputs on a device, floating ones in the model's precision."""
    # In this order pinned memory is copied while the device computes; a cast on the CPU would wait.
    moved = {name: value.to(device, non_blocking=True) for name, value in inputs.items()}
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in moved.items()}


def pixels_of(family: Family, processor: Any, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    """The pixel inputs of one sample, as its encoded conversation has them; empty without images.

    Raises:
        UnusableSample: As `check_picture`.
    """
    if not images:
        return {}
    for image in images:
        check_picture(processor, image)
    text = {} if family.pixels_without_text else {"text": [processor.image_token * len(images)]}
    outputs = processor(images=[list(images)], return_tensors="pt", **text)
    return {name: outputs[name] for name in family.pixel_inputs if name in outputs}


def pixels_and_count(
    family: Family, processor: Any, images: Sequence[Image.Image], image_token_id: int
) -> tuple[dict[str, Tensor], int]:
    """The pixel inputs of one sample, and how many image tokens the processor makes of its images.

    The id is that of the model's config: a processor may name its placeholder, which is another token.

    Raises:
        UnusableSample: As `check_picture`.
    """
    if not images:
        return {}, 0
    for image in images:
        check_picture(processor, image)
    outputs = processor(text=[processor.image_token * len(images)], images=[list(images)], return_tensors="pt")
    pixels = {name: outputs[name] for name in family.pixel_inputs if name in outputs}
    return pixels, int((outputs["input_ids"] == image_token_id).sum())


def join_pixels(family: Family, pixel_inputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The pixels of several samples as one batch; empty if no sample has any.

    Raises:
        UserError: If an input is one that the family does not name.
    """
    if unknown := {name for pixels in pixel_inputs for name in pixels} - set(family.pixel_inputs):
        raise UserError(
            f"the image processor gives {sorted(unknown)}, the family of {'/'.join(family.model_types)} takes "
            f"{sorted(family.pixel_inputs)}; name the input in the family's entry in stages/families"
        )
    joined = {}
    for name, joining in family.pixel_inputs.items():
        parts = [pixels[name] for pixels in pixel_inputs if name in pixels]
        if parts:
            joined[name] = torch.cat(_padded(parts) if joining == "pad" else parts)
    return joined


def _padded(parts: Sequence[Tensor]) -> list[Tensor]:
    """Pads all axes but the first to the largest size, with zeros."""
    largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    grown = [part.new_zeros((len(part), *largest)) for part in parts]
    for whole, part in zip(grown, parts, strict=True):
        whole[tuple(map(slice, part.shape))] = part
    return grown
