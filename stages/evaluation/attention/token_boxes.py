"""Which part of the picture each image token shows, as far as a family's tokens have places."""

import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from stages.conversations.encoder import EncodedConversation
from stages.families.family import Family
from storage.codecs.token_cells import num_cells_of
from storage.errors import UserError

_IN_ROWS = {"glm4v", "glm4v_moe", "qwen2_vl", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe"}
_IN_A_SQUARE = {"llava", "gemma3"}


def token_boxes(family: Family, processor: Any, encoded: EncodedConversation, image: Image.Image) -> Tensor:
    """The box of each image token of a sample with one image.

    Args:
        family: Of the vision tower.
        processor: That made the pixels.
        encoded: The sample with its pixels.
        image: Its picture, for the size.

    Returns:
        `[N, 4]` float32 left, top, right, bottom as fractions of the picture. A token that shows none of it, such as
        one that ends a row or stands for padding, has an empty box.

    Raises:
        UserError: If it is not known where tokens of this family, or so many of them, lie.
    """
    types, num_tokens = set(family.model_types), len(encoded.image_positions)
    model_type = "/".join(family.model_types)
    if encoded.num_images != 1:
        raise UserError(f"a sample has {encoded.num_images} images; tokens are placed in samples with one")
    if _IN_ROWS & types:
        _, height, width = encoded.pixel_inputs["image_grid_thw"][0].tolist()
        merge = processor.image_processor.merge_size
        boxes = _grid(height // merge, width // merge)
    elif _IN_A_SQUARE & types:
        boxes = _within(_square(num_tokens, model_type), _shown(processor.image_processor, *image.size))
    elif "llava_next" in types:
        boxes = _tiled(processor, *image.size)
    else:
        known = ", ".join(sorted({"llava_next"} | _IN_ROWS | _IN_A_SQUARE))
        raise UserError(f"it is not known where the image tokens of {model_type} lie; known of {known}")
    if len(boxes) != num_tokens:
        raise UserError(f"{num_tokens} image tokens of {model_type} were found where its grid has {len(boxes)}")
    return boxes


def cell_boxes(boxes_X4: Tensor, cells_X: Tensor | None) -> Tensor:
    """`[N, 4]` the box around the boxes of each cell's tokens, empty where all are; the same boxes without cells."""
    if cells_X is None:
        return boxes_X4
    boxes = []
    for cell in range(num_cells_of(cells_X)):
        own_4 = boxes_X4[cells_X == cell]
        shown = own_4[(own_4[:, 2] > own_4[:, 0]) & (own_4[:, 3] > own_4[:, 1])]
        around = torch.cat([shown[:, :2].amin(0), shown[:, 2:].amax(0)]) if len(shown) else torch.zeros(4)
        boxes.append(around)
    return torch.stack(boxes)


def _grid(rows: int, columns: int) -> Tensor:
    """`[rows * columns, 4]` boxes of equal cells, row by row."""
    top = (torch.arange(rows) / rows)[:, None].expand(rows, columns)
    left = (torch.arange(columns) / columns)[None].expand(rows, columns)
    return torch.stack([left, top, left + 1 / columns, top + 1 / rows], -1).flatten(0, 1)


def _square(num_tokens: int, model_type: str) -> Tensor:
    """Cells of a square grid; its first is missing where the model takes it for a class token that is not there."""
    for missing in (0, 1):
        side = math.isqrt(num_tokens + missing)
        if side * side == num_tokens + missing:
            return _grid(side, side)[missing:]
    raise UserError(f"{num_tokens} image tokens of {model_type} form no square, with or without a first one left out")


def _shown(images: Any, width: int, height: int) -> tuple[float, float, float, float]:
    """The part of the picture that its square of pixels shows, in fractions; beyond 0 and 1 where it is padded."""
    settings = vars(images)
    size, crop = dict(settings.get("size") or {}), settings.get("crop_size")
    across, down = 1.0, 1.0
    if settings.get("do_pad"):
        across, down = max(width, height) / width, max(width, height) / height
    elif size.get("shortest_edge") and settings.get("do_center_crop") and crop:
        scale = size["shortest_edge"] / min(width, height)
        across, down = dict(crop)["width"] / (width * scale), dict(crop)["height"] / (height * scale)
    return (1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2


def _within(boxes_N4: Tensor, part: tuple[float, float, float, float]) -> Tensor:
    """Boxes in a part of the picture as boxes in the picture."""
    left, top, right, bottom = part
    scale = torch.tensor([right - left, bottom - top] * 2)
    return (boxes_N4 * scale + torch.tensor([left, top] * 2)).clamp(0, 1)


def _tiled(processor: Any, width: int, height: int) -> Tensor:
    """LLaVA-NeXT: the whole picture, stretched; then its tiles together, without padding, rows ended by a token."""
    images = processor.image_processor
    edge = images.size["shortest_edge"] if "shortest_edge" in images.size else images.size["height"]
    side = edge // processor.patch_size
    rows, columns = get_anyres_image_grid_shape((height, width), images.image_grid_pinpoints, edge)
    cells_4hw = _grid(rows * side, columns * side).T.reshape(4, rows * side, columns * side)
    # The picture keeps its proportions and stands in the middle of the tiles.
    scale = min(columns * edge / width, rows * edge / height)
    across, down = columns * edge / (width * scale), rows * edge / (height * scale)
    kept_4hw = unpad_image(cells_4hw, (height, width))
    ends_4h1 = torch.zeros(4, kept_4hw.shape[1], 1)
    part = (1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2
    placed = _within(kept_4hw.flatten(1).T, part).T.reshape(kept_4hw.shape)
    return torch.cat([_grid(side, side), torch.cat([placed, ends_4h1], -1).flatten(1).T])
