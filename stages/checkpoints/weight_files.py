"""Which files hold a checkpoint's weights, and whether they are whole; known without torch."""

from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from storage.digests import parse_json
from storage.errors import UserError
from storage.regular_files import open_regular, read_regular

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
MAX_HEADER_BYTES = 2**24
"""That of a hundred thousand tensors in one file; each costs the library memory and time before it is looked at."""


def weight_files(folder: Path) -> list[Path]:
    """The files that are loaded, and no other: `SINGLE`, otherwise those that `INDEX` names.

    Raises:
        UserError: If there is neither, or a file that the index names is missing, or an adapter lies beside them.
    """
    if (folder / _ADAPTER).exists():
        raise UserError(
            f"{folder / _ADAPTER} asks for a PEFT adapter on top of the weights, which is refused; merge it into the "
            "model (merge_and_unload) and save that, or remove the file"
        )
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return sorted(folder / name for name in _indexed_names(folder))
    raise UserError(
        f"{folder} has neither {SINGLE} nor {INDEX}. Pickled weights (*.bin, *.pth) are never loaded, as that can run "
        "code: where you trust them, load the model and call save_pretrained(..., safe_serialization=True)"
    )


def check_files(folder: Path) -> None:
    """Reads the header of each weight file, which says how long it is.

    Raises:
        UserError: As `weight_files`; if one is cut short or no safetensors file, or its header is too large.
    """
    for path in weight_files(folder):
        with open_regular(path) as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise UserError(
                f"{path} says that its header has {header_bytes} bytes, at most {MAX_HEADER_BYTES} are read; fetch it "
                "again"
            )
        try:
            with safe_open(path, framework="numpy"):
                pass
        except SafetensorError as error:
            raise UserError(
                f"{path} ({path.stat().st_size} bytes) is not whole, or no safetensors file ({error}); a download or "
                "copy that broke off leaves such a file: fetch it again"
            ) from error


def _indexed_names(folder: Path) -> set[str]:
    index = folder / INDEX
    fields = parse_json(read_regular(index), str(index))
    named = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(named, dict):
        raise UserError(f"{index} has no weight_map; expected the index of a checkpoint in several files")
    names = {str(name) for name in named.values()}
    # Only names of its own files: others would leave it.
    if lost := names - {path.name for path in folder.glob("*.safetensors")}:
        raise UserError(f"{index} names {some(lost)}, which the folder does not hold; fetch the checkpoint again")
    return names


def some(names: Iterable[str]) -> str:
    """The first three names and how many more there are; "none" for none."""
    first, rest = sorted(names)[:3], sorted(names)[3:]
    return (", ".join(first) or "none") + (f" and {len(rest)} more" if rest else "")
