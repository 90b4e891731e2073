"""The processor of a converted checkpoint: tokenizer with an image token, image processor, chat template."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from transformers import AutoImageProcessor, AutoTokenizer, LlavaProcessor, PreTrainedTokenizerBase
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from stages.checkpoints.configs import check_configs
from stages.checkpoints.resolve import local_folder
from stages.checkpoints.tokenizer_rules import check_tokenizer
from stages.conversations.chat_templates import read_template
from stages.convert.layout import class_tokens
from storage.errors import UserError, first_line

IMAGE_TOKEN: Final = "<image>"  # noqa: S105
END_TOKEN: Final = "<|endoftext|>"  # noqa: S105
_TEMPLATE: Final = "llava-1.5"
"""The released models were trained on LLaVA-1.5's format, where an answer ends with `END_TOKEN` if there is one."""


def load_tokenizer(source: Path, chosen: str | None) -> tuple[PreTrainedTokenizerBase | None, str | None]:
    """The tokenizer with `IMAGE_TOKEN` in it, and where it is from; None if nobody chose one and none was found.

    It is the `chosen` one, a folder or hub id, else that of the released folder `source`.

    Raises:
        UserError: If the chosen one, or that of `source`, cannot be read.
    """
    files = ("tokenizer.json", "tokenizer.model", "vocab.json")
    tokenizer, origin = _load(AutoTokenizer, "tokenizer", source, files, chosen)
    if tokenizer is not None:
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    return tokenizer, origin


def load_image_processor(source: Path, config: Mapping[str, Any], chosen: str | None) -> tuple[Any, str]:
    """The image processor, and where it is from: the `chosen` one, else that of the released folder `source`.

    Where there is none, it is made from the vision tower's config: SigLIP and CLIP each have one way of preparing
    images.

    Raises:
        UserError: If the chosen one, or that of `source`, cannot be read, or makes images of another size than
            the tower takes.
    """
    wanted = config["vision_config"]["image_size"]
    files = ("preprocessor_config.json", "processor_config.json")
    images, origin = _load(AutoImageProcessor, "image processor", source, files, chosen)
    if images is None:
        square, origin = {"height": wanted, "width": wanted}, "the vision tower's config"
        if config["vision_config"]["model_type"] == "siglip_vision_model":
            images = SiglipImageProcessorPil(size=square)
        else:
            images = CLIPImageProcessorPil(size={"shortest_edge": wanted}, crop_size=square)
    made = _side(images)
    if made != wanted:
        raise UserError(
            f"{source}: the image processor of {origin} makes images of {made} pixels, the tower takes {wanted}"
        )
    return images, str(origin)


def make_processor(
    config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, images: Any, strategy: str
) -> LlavaProcessor:
    """A Llava processor that makes the pixels and the text of the released code.

    `strategy` is `vision_feature_select_strategy` of the converted config.
    """
    end = END_TOKEN if END_TOKEN in tokenizer.get_vocab() else tokenizer.eos_token
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=config["vision_config"]["patch_size"],
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=class_tokens(config),
        image_token=IMAGE_TOKEN,
        chat_template=read_template(_TEMPLATE).replace("eos_token", f"'{end}'"),
    )


def _load(
    auto_class: Any, what: str, source: Path, files: Collection[str], chosen: str | None
) -> tuple[Any, str | None]:
    """What the library reads from `chosen`, else from `source`, and from where."""
    if chosen is None and not any((source / name).is_file() for name in files):
        return None, None
    origin = chosen or str(source)
    try:
        folder = local_folder(origin)
        check_configs(folder, with_model=False)
        check_tokenizer(folder)
        return auto_class.from_pretrained(folder, trust_remote_code=False), origin
    # For a damaged tokenizer.json the library raises a bare Exception.
    except Exception as error:
        flag = f"--{what.replace(' ', '-')}"
        found = f"no {what} at {origin} ({type(error).__name__}: {first_line(error)})"
        raise UserError(f"{found}; name a folder or hub id with {flag}") from error


def named_tokenizer(config: Mapping[str, Any]) -> str | None:
    """What a released config says its tokenizer is."""
    keys = ("tokenizer_name_or_path", "llm_model_name_or_path")
    return next((str(config[key]) for key in keys if config.get(key)), None)


def _side(images: Any) -> object:
    """Height of the images made, None unless it is also their width."""
    size = images.crop_size if getattr(images, "do_center_crop", False) else images.size
    return size["height"] if size["height"] == size["width"] else None
