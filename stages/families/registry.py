"""What differs between model families: one entry each, found by the config's `model_type`."""

from dataclasses import replace

from stages.families.family import Family
from storage.errors import UserError

# Any vision tower, `Linear -> GELU -> Linear`, any causal decoder.
LLAVA = Family(
    model_types=("llava",),
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
)
# Qwen3-VL also adds features of earlier vision layers inside its first decoder layers ("deepstack").
QWEN3 = replace(
    QWEN2,
    model_types=("qwen3_vl",),
    projector_prefixes=("model.visual.merger.", "model.visual.deepstack_merger_list."),
    features_enter_once=False,
    last_linear=None,
)
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
INTERNVL = replace(LLAVA, model_types=("internvl",), pixels_without_text=False, layout="square_tiles")
# The tokens of one image attend to each other in both directions, within the window of sliding layers.
GEMMA3 = replace(
    LLAVA,
    model_types=("gemma3",),
    causal_image_tokens=False,
    # Without these the model masks image tokens as text, without an error.
    modality_input="token_type_ids",
    last_linear=None,
    layout=None,
)

FAMILIES: dict[str, Family] = {
    model_type: family
    for family in (LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, QWEN2, QWEN3, IDEFICS3, INTERNVL, GEMMA3)
    for model_type in family.model_types
}


def family_of(model_type: str) -> Family:
    """The family a checkpoint belongs to.

    Raises:
        UserError: If no family has this `model_type`.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"model type {model_type!r} is not a known teacher family; known: {', '.join(sorted(FAMILIES))}. "
            "Released CompoDistill and TinyLLaVA checkpoints go through `cdp convert-checkpoint` first; another family "
            "is one entry in stages/families (docs/families.md)"
        )
    return FAMILIES[model_type]
