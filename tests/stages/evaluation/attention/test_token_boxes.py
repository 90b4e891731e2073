"""Image tokens lie where the processors put the pixels that they are made of."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from stages.checkpoints.processors import load_processor
from stages.conversations.encoder import ConversationEncoder, EncodedConversation
from stages.evaluation.attention.token_boxes import token_boxes
from stages.families.registry import LLAVA, family_of
from storage.errors import UserError
from tests.tiny_families import RECIPES, make_tiny_family

IN_ROWS = (
    *("glm4v", "glm4v_moe", "qwen2_5_vl", "qwen2_vl"),
    *("qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe"),
)
PLACED = ("gemma3", "llava_next", *IN_ROWS)


def encoded(num_tokens: int, num_images: int = 1) -> EncodedConversation:
    ids = torch.zeros(num_tokens, dtype=torch.long)
    return EncodedConversation(ids, ids.bool(), {}, torch.arange(num_tokens), num_images)


def llava(**settings: object) -> SimpleNamespace:
    return SimpleNamespace(image_processor=SimpleNamespace(**settings))


def of_family(folder: Path, image: Image.Image) -> tuple[EncodedConversation, torch.Tensor]:
    processor = load_processor(folder)
    read = ConversationEncoder(processor, processor.image_token_id, 4096).encode_pair("What?", "Red.", [image])
    family = family_of(folder.name)
    return read, token_boxes(family, processor, read, image)


@pytest.mark.parametrize("size", [(64, 32), (40, 56), (48, 48)])
@pytest.mark.parametrize("name", PLACED)
def test_tokens_of_a_family_tile_the_picture_without_a_gap(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    read, boxes_N4 = of_family(make_tiny_family(tmp_path / name, name), Image.new("RGB", size))
    assert len(boxes_N4) == len(read.image_positions)
    area_N = (boxes_N4[:, 2] - boxes_N4[:, 0]) * (boxes_N4[:, 3] - boxes_N4[:, 1])
    # LLaVA-NeXT shows the whole picture once more in its tiles, with an empty box at the end of each row.
    assert float(area_N.sum()) == pytest.approx(2 if name == "llava_next" else 1, abs=1e-5)
    assert bool((area_N == 0).any()) == (name == "llava_next")


@pytest.mark.parametrize("name", IN_ROWS)
def test_a_bright_corner_is_in_the_pixels_of_the_tokens_whose_boxes_lie_in_it(name: str, tmp_path: Path) -> None:
    picture = Image.new("RGB", (64, 32))
    picture.paste((255, 255, 255), (48, 0, 64, 16))
    read, boxes_N4 = of_family(make_tiny_family(tmp_path / name, name), picture)
    pixels = read.pixel_inputs["pixel_values"]
    brightness_N = pixels.reshape(len(boxes_N4), -1).mean(-1)
    center_N2 = (boxes_N4[:, :2] + boxes_N4[:, 2:]) / 2
    inside_N = (center_N2[:, 0] > 0.75) & (center_N2[:, 1] < 0.5)
    assert 0 < int(inside_N.sum()) < len(boxes_N4)
    assert float(brightness_N[inside_N].min()) > float(brightness_N[~inside_N].max())


def test_a_grid_whose_first_token_the_model_leaves_out_is_known() -> None:
    whole = token_boxes(LLAVA, llava(), encoded(729), Image.new("RGB", (30, 30)))
    assert torch.equal(token_boxes(LLAVA, llava(), encoded(728), Image.new("RGB", (30, 30))), whole[1:])


def test_a_square_crop_shows_the_middle_of_a_wide_picture() -> None:
    processor = llava(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_center_crop=True)
    boxes = token_boxes(LLAVA, processor, encoded(4), Image.new("RGB", (80, 40)))
    assert boxes.tolist() == [[0.25, 0, 0.5, 0.5], [0.5, 0, 0.75, 0.5], [0.25, 0.5, 0.5, 1], [0.5, 0.5, 0.75, 1]]


def test_tokens_of_padding_show_nothing() -> None:
    boxes = token_boxes(LLAVA, llava(do_pad=True), encoded(16), Image.new("RGB", (80, 40)))
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert area.reshape(4, 4).sum(1).tolist() == [0, 0.5, 0.5, 0]


@pytest.mark.parametrize("name", sorted(set(RECIPES) - set(PLACED)))
def test_a_family_whose_tokens_cannot_be_placed_is_named(name: str) -> None:
    with pytest.raises(UserError, match=rf"{name}\b.* lie; known of"):
        token_boxes(family_of(name), llava(), encoded(4), Image.new("RGB", (8, 8)))


def test_tokens_that_form_no_grid_and_several_images_are_refused() -> None:
    with pytest.raises(UserError, match="17 image tokens of llava form no square"):
        token_boxes(LLAVA, llava(), encoded(17), Image.new("RGB", (8, 8)))
    with pytest.raises(UserError, match="has 2 images"):
        token_boxes(LLAVA, llava(), encoded(8, 2), Image.new("RGB", (8, 8)))
