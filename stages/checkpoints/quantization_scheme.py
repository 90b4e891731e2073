"""How a checkpoint's weights are quantized, as its config says it; known without a library."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from storage.errors import UserError

KEY = "quantization_config"
BITSANDBYTES = "bitsandbytes"


class _Config(Protocol):
    """A config of the library."""

    def to_dict(self) -> dict[str, Any]: ...


def scheme_of(config: _Config | Mapping[str, Any]) -> str | None:
    """How a checkpoint's weights are quantized, such as `bitsandbytes, 4 bits (nf4)`; None if they are not."""
    settings = scheme_settings(config)
    if settings is None:
        return None
    width = bits_of(settings)
    kind = settings.get("bnb_4bit_quant_type") if width == 4 else None
    kind = kind or settings.get("format") or settings.get("fmt") or settings.get("quant_type")
    named = f"{method_of(settings)}, {width} bits" if width is not None else method_of(settings)
    return named + (f" ({kind:.50})" if isinstance(kind, str) else "")


def refuse_quantized(config: _Config | Mapping[str, Any], folder: Path, role: str, todo: str = "") -> None:
    """Refuses a checkpoint that is to be trained, or to be part of what is trained, if its weights are quantized.

    Raises:
        UserError: If they are; names the scheme, and says what to do.
    """
    if (scheme := scheme_of(config)) is not None:
        todo = todo or "name the checkpoint that it was quantized from (quantized ones are welcome as teachers)"
        raise UserError(f"{folder} is quantized ({scheme}), and {role} needs weights of 16 or 32 bits: {todo}")


def scheme_settings(config: _Config | Mapping[str, Any]) -> dict[str, Any] | None:
    """What the config says of the whole model or of its decoder; the library reads both places."""
    fields = config if isinstance(config, Mapping) else config.to_dict()
    for part in (fields, fields.get("text_config")):
        if isinstance(part, Mapping) and (settings := part.get(KEY)):
            # What is no object names no method that there is, and so is refused.
            return dict(settings) if isinstance(settings, Mapping) else {"quant_method": f"{settings!r:.50}"}
    return None


def bits_of(settings: Mapping[str, Any]) -> int | None:
    """Bits of a packed weight in these settings; None where they do not say."""
    if settings.get("load_in_4bit"):
        return 4
    width = 8 if settings.get("load_in_8bit") else settings.get("bits") or settings.get("w_bit")
    return width if isinstance(width, int) else None


def method_of(settings: Mapping[str, Any]) -> str:
    """The method's name in these settings, cut to what can be printed."""
    in_bits = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    return str(settings.get("quant_method") or (BITSANDBYTES if in_bits else "an unnamed method"))[:50]
