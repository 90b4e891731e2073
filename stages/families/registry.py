"""What differs between model families: one entry each, found by the config's `model_type`."""

from dataclasses import replace

from stages.families.family import Family
from storage.errors import UserError

# Any vision tower, `Linear -> GELU -> Linear`, any causal decoder.
LLAVA = Family(
    model_types=("llava",),
    # Of Pixtral's tower, images of several sizes: padded to the largest, and cut to their sizes by the model.
    pixel_inputs={"pixel_values": "pad", "image_sizes": "cat"},
    vision_prefixes=("model.vision_tower.", "model.multi_modal_projector."),
    projector_prefixes=("model.multi_modal_projector.",),
    last_linear="multi_modal_projector.linear_2",
    layout="square",
)
# 1.6: the image in tiles beside a small whole, a learnt token at each row's end; N differs by image.
LLAVA_NEXT = replace(
    LLAVA,
    model_types=("llava_next",),
    vision_prefixes=(*LLAVA.vision_prefixes, "model.image_newline"),
    projector_prefixes=(*LLAVA.projector_prefixes, "model.image_newline"),
    # [images, tiles, channels, height, width]: the model takes as many tiles as the image's size says.
    pixel_inputs={"pixel_values": "pad", "image_sizes": "cat"},
    added_vectors=("image_newline",),
    layout="tiles_in_rows",
)
# Tiles as in LLaVA-NeXT for a sample's only image, several images of a sample without tiles.
LLAVA_ONEVISION = replace(
    LLAVA_NEXT,
    model_types=("llava_onevision",),
    # batch_num_images says which images stand alone; without it the model would look for tiles in all of them.
    pixel_inputs={"pixel_values": "pad", "image_sizes": "cat", "batch_num_images": "cat"},
    # Large pictures are scaled down behind the vision tower, to a size that the model works out.
    layout=None,
)
# Qwen2-VL and Qwen2.5-VL: patches of all images in one row, N follows the image's size, 3D positions.
QWEN2 = Family(
    model_types=("qwen2_vl", "qwen2_5_vl"),
    vision_prefixes=("model.visual.",),
    projector_prefixes=("model.visual.merger.",),
    pixel_inputs={"pixel_values": "cat", "image_grid_thw": "cat"},
    # The model works out its 3D positions from these and the grid.
    modality_input="mm_token_type_ids",
    last_linear="visual.merger.mlp.2",
    layout="sizes",
    rotary_axes="in_order",
)
# Qwen3-VL also adds features of earlier vision layers inside its first decoder layers ("deepstack").
QWEN3 = replace(
    QWEN2,
    model_types=("qwen3_vl", "qwen3_vl_moe"),
    projector_prefixes=("model.visual.merger.", "model.visual.deepstack_merger_list."),
    deepstack=True,
    last_linear=None,
    rotary_axes="interleaved",
)
# Without deepstack again; most layers of the decoder have linear attention.
QWEN3_5 = replace(
    QWEN2,
    model_types=("qwen3_5", "qwen3_5_moe"),
    last_linear="visual.merger.linear_fc2",
    decoder_alone=True,
    rotary_axes="interleaved",
)
# GLM-4.1V and GLM-4.5V: the tower is another, the inputs are those of Qwen.
GLM4V = replace(QWEN2, model_types=("glm4v", "glm4v_moe"), last_linear="visual.merger.down_proj")
# Idefics3 and SmolVLM: tiles of one size, each between text tokens that name its row and column.
IDEFICS3 = Family(
    model_types=("idefics3", "smolvlm"),
    vision_prefixes=("model.vision_model.", "model.connector."),
    projector_prefixes=("model.connector.",),
    # [samples, tiles of all images, ...]: the model leaves out tiles that are zero throughout.
    pixel_inputs={"pixel_values": "pad", "pixel_attention_mask": "pad"},
    last_linear="connector.modality_projection.proj",
    layout="square_tiles",
)
# In the layout of transformers: tiles of one size in a row, a fixed number of tokens a tile.
INTERNVL = replace(
    LLAVA,
    model_types=("internvl",),
    pixel_inputs={"pixel_values": "cat"},
    pixels_without_text=False,
    layout="square_tiles",
)
# The tokens of one image attend to each other in both directions, within the window of sliding layers.
GEMMA3 = replace(
    LLAVA,
    model_types=("gemma3",),
    pixel_inputs={"pixel_values": "cat"},
    causal_image_tokens=False,
    # Without these the model masks image tokens as text, without an error.
    modality_input="token_type_ids",
    last_linear=None,
    layout=None,
)
# As Gemma 3, in the sliding layers alone, and only where `use_bidirectional_attention` says so; images of any shape.
GEMMA4 = Family(
    model_types=("gemma4",),
    vision_prefixes=("model.vision_tower.", "model.embed_vision."),
    projector_prefixes=("model.embed_vision.",),
    causal_image_tokens=False,
    # [images, patches, ...]: padded by the processor to as many patches as an image may have.
    pixel_inputs={"pixel_values": "cat", "image_position_ids": "cat"},
    modality_input="mm_token_type_ids",
    caps_logits=True,
)
# An image token is a mixture of the rows of a table; separators of tiles, rows and images are rows of it too.
OVIS2 = Family(
    model_types=("ovis2",),
    vision_prefixes=("model.vision_tower.", "model.visual_embeddings_table."),
    projector_prefixes=("model.visual_embeddings_table.",),
    marks_with_pixels=True,
)
# Mistral Small 3.1 and later: patches of all images in one row, as Pixtral reads them; N follows the image's size.
MISTRAL3 = replace(LLAVA, model_types=("mistral3",), layout=None)
# Tiles and a small whole, each as patches that are padded to one number; the decoder has convolutions in part.
LFM2_VL = replace(
    LLAVA,
    model_types=("lfm2_vl",),
    pixel_inputs={"pixel_values": "cat", "spatial_shapes": "cat", "pixel_attention_mask": "cat"},
    pixels_without_text=False,
    layout=None,
)

_ALL = (
    *(LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, QWEN2, QWEN3, QWEN3_5, GLM4V),
    *(IDEFICS3, INTERNVL, GEMMA3, GEMMA4, OVIS2, MISTRAL3, LFM2_VL),
)
FAMILIES: dict[str, Family] = {model_type: family for family in _ALL for model_type in family.model_types}

REFUSED = {
    "llama4": (
        "transformers has no model of it without the head, so that the states of answer rows alone cannot be had, and "
        "its vision part gives features that are not projected yet"
    ),
    "molmo2": (
        "its image tokens attend to the marks behind the last of them too (<im_col>, <im_end>), and each image to "
        "later ones, while maps are taken from the tokens up to the last image token"
    ),
    "paligemma": (
        "its image tokens attend to the question behind them, so that conversations about one image have no map in "
        "common, and its processor takes one question without a chat template"
    ),
    "phi4_multimodal": (
        "transformers has no model of images and text for it (AutoModelForImageTextToText), and keeps its vision tower "
        "inside the decoder's embedding"
    ),
}
"""Families that transformers knows and this project cannot teach from, and why not."""


def family_of(model_type: str) -> Family:
    """The family a checkpoint belongs to.

    Raises:
        UserError: If no family has this `model_type`; says why, where it is known.
    """
    if (reason := REFUSED.get(model_type)) is not None:
        raise UserError(
            f"a model of type {model_type} can neither teach nor be a student with its own vision tower: {reason}. "
            f"Choose one of {', '.join(sorted(FAMILIES))} (docs/families.md)"
        )
    if model_type not in FAMILIES:
        raise UserError(
            f"model type {model_type!r} is not a known teacher family; known: {', '.join(sorted(FAMILIES))}. "
            "Released CompoDistill and TinyLLaVA checkpoints go through `cdp convert-checkpoint` first; another family "
            "is one entry in stages/families (docs/families.md)"
        )
    return FAMILIES[model_type]
