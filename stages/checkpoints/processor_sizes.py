"""How large a picture becomes in a processor: estimated from its settings before one is made, then tried with one."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import ProcessorMixin

from stages.checkpoints.tokenizer_rules import panics_raised
from stages.unusable_sample import UnusableSample
from storage.errors import UserError, first_line

MAX_PIXELS = 2**26
"""Pixels that one picture may become, those of its tiles together: 0.8 GB as 32-bit floats."""
MAX_TOKENS = 2**16
"""Image tokens of one picture; real ones have up to 16,384."""
_MAX_LIST = 1000
"""Entries of a list, such as the grids of tiles that each picture is compared with."""

_COUNTS = re.compile(r"size|edge|height|width|pixels|patch|pinpoints|crops|image_tokens|seq_len|divisor")
"""In names of settings that are sides, areas and counts."""
_TRIED = (64, 48)
"""Width and height of the picture that is tried."""


def check_settings(settings: dict[str, Any], file: Path) -> None:
    """Refuses a processor's JSON file whose sides, areas and counts no picture has, before the library reads it.

    Raises:
        UserError: If one is such; names it.
    """
    for wrong in _impossible(settings, ""):
        raise _unusable(str(file), wrong)


def check_processor(processor: ProcessorMixin, folder: Path) -> None:
    """Refuses a processor that makes pictures or numbers of image tokens that are too large, or none at all.

    Raises:
        UserError: If it does; names what was found. At most some seconds and a few GB are spent on finding out.
    """
    settings = processor.to_dict()
    pixels, tokens = _estimated(settings, settings.get("image_processor") or {})
    if pixels > MAX_PIXELS:
        wrong: str | None = f"a picture may become {pixels:.3g} pixels, at most {MAX_PIXELS:,} are made"
    elif tokens > MAX_TOKENS:
        wrong = f"a picture may become {tokens:.3g} image tokens, at most {MAX_TOKENS:,} are made"
    else:
        wrong = _tried(processor)
    if wrong is not None:
        raise _unusable(f"the {type(processor).__name__} of {folder}", wrong)


def _unusable(what: str, wrong: str) -> UserError:
    todo = "fetch processor_config.json and preprocessor_config.json of the checkpoint again, or mend them"
    return UserError(f"{what} has settings that cannot be used: {wrong}; {todo}")


def check_picture(processor: Any, image: Image.Image) -> None:
    """Refuses a narrow picture that becomes too large when its shorter edge gets the length that the processor sets.

    Raises:
        UnusableSample: If it does.
    """
    images = processor.image_processor
    pixels = _area(vars(images).get("size"), *image.size, of_area=hasattr(images, "merge_size"))
    if pixels > MAX_PIXELS:
        found = f"{image.width}x{image.height} pixels become {pixels:.3g}, at most {MAX_PIXELS:,} are made"
        raise UnusableSample("image_too_large", f"{found}; cut the image")


def _impossible(value: Any, name: str) -> Iterator[str]:
    """What is wrong with sides, areas and counts at any depth below a setting of this name."""
    least = 0 if name in ("num_additional_image_tokens", "min_pixels") else 1
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _impossible(part, key) if key != "video_processor" else ()
    elif isinstance(value, list) and len(value) > _MAX_LIST:
        yield f"{name} has {len(value)} entries, at most {_MAX_LIST} are taken"
    elif isinstance(value, list):
        for part in value:
            yield from _impossible(part, name) if part is not None else [f"{name} holds null"]
    elif _COUNTS.search(name) and not name.endswith("_tolerance") and not isinstance(value, bool | None):
        in_range = isinstance(value, int) and least <= value <= MAX_PIXELS
        yield from (
            [] if in_range else [f"{name} is {value!r:.50}, expected a whole number from {least} to {MAX_PIXELS:,}"]
        )


def _estimated(settings: Mapping[str, Any], images: Mapping[str, Any]) -> tuple[float, float]:
    """Pixels and image tokens of one picture at most, of the shape of `_TRIED`."""
    merge = images.get("merge_size") or 1
    sizes = [images.get(name) for name in ("size", "crop_size", "pad_size", "max_image_size")]
    tile = max(_area(size, *_TRIED, of_area="merge_size" in images) for size in sizes)
    edge = (images.get("encoder_patch_size") or 0) * (images.get("downsample_factor") or 1)
    tile = max(tile, (images.get("tile_size") or 0) ** 2, (images.get("max_image_tokens") or 1) * edge**2)
    grids = images.get("image_grid_pinpoints") or ()
    grid = max((height * width for height, width in grids), default=0)
    num_tiles = 1.0 + sum(images.get(name) or 0 for name in ("max_patches", "max_tiles", "pan_and_scan_max_num_crops"))
    num_tiles += grid / (_area(sizes[0], *_TRIED, of_area=False) or 1)
    if sizes[3]:  # the picture is made as large as `size`, then cut into tiles of this size
        num_tiles += _area(sizes[0], *_TRIED, of_area=False) / (_area(sizes[3], *_TRIED, of_area=False) or 1)
    patch = (settings.get("patch_size") or images.get("patch_size") or 0) * merge
    pixels = max(tile * (1 if sizes[3] else num_tiles), grid, patch**2) * (images.get("temporal_patch_size") or 1)
    of_tile = max(settings.get(name) or 0 for name in ("image_seq_len", "image_seq_length", "num_image_tokens"))
    of_patches = max(tile, grid) / patch**2 if patch else 0
    return pixels, max(of_tile * num_tiles, of_patches) + (settings.get("num_additional_image_tokens") or 0)


def _area(size: Any, width: int, height: int, *, of_area: bool) -> float:
    """Pixels of a picture that is resized to `size`, whose edges are areas for some processors; 0 without a size."""
    held = dict(size) if size else {}
    short, long = held.get("shortest_edge"), held.get("longest_edge")
    if held.get("height") and held.get("width"):
        return float(held["height"] * held["width"])
    if of_area:
        return float(max(short or 0, long or 0))
    if short:
        scale = min(short / min(width, height), (long or float("inf")) / max(width, height))
        return float(width * height * scale**2)
    return float((long or 0) ** 2 or (held.get("max_height") or 0) * (held.get("max_width") or 0))


def _tried(processor: Any) -> str | None:
    """What goes wrong with one small picture, None if nothing does."""
    placeholder = getattr(processor, "image_token", None)
    text = {"text": [placeholder]} if placeholder else {}
    try:
        with panics_raised():
            made = processor(images=[[Image.new("RGB", _TRIED, "grey")]], return_tensors="pt", **text)
        pixels = made["pixel_values"]
    # Settings of wrong types raise whatever the library's arithmetic does.
    except Exception as error:
        return f"a picture of {_TRIED[0]}x{_TRIED[1]} pixels fails ({type(error).__name__}: {first_line(error)})"
    return None if bool(torch.isfinite(pixels).all()) else "they make pixels that are no finite numbers"
