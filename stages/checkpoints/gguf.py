"""Finds GGUF files, and compares their heads with bounds and with the file's length before a library reads them."""

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from storage.errors import CorruptData, UserError
from storage.regular_files import is_regular, open_regular

MAX_HEAD_BYTES = 2**26
"""A vocabulary of 262,000 tokens with its merges takes 15 MB."""
MAX_ENTRIES = 2**21
"""Of all lists together; those of that vocabulary have 1.3 million."""
_VOCABULARY = tuple(f"tokenizer.ggml.{name}" for name in ("tokens", "merges", "scores", "token_type"))
_MAX_OTHER_ENTRIES = 2**12
"""Of a list that is none of the vocabulary; the library turns each entry into several objects."""
_MAX_FIELDS, _MAX_TENSORS, _MAX_DIMENSIONS = 2**12, 2**16, 4
_MAX_ALIGNMENT = 2**16
_MAX_COUNT = 2**12
"""Layers, heads or experts that are believed, as in other configs."""
_COUNTS = ("block_count", "expert_count", "expert_used_count", "head_count", "head_count_kv")

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Kind of a value -> its format in `struct`."""
_TEXT, _LIST = 8, 9
_VISION = "clip"
"""How llama.cpp names the architecture of vision towers."""
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")

Value = int | float | bool | str


@dataclass(frozen=True)
class GgufHead:
    """What a GGUF file says before its tensors.

    Attributes:
        fields: Its settings; of lists, the number of entries.
        shapes: Of each tensor, slowest dimension first.
        spans: Where in the file each tensor begins and ends.
    """

    fields: Mapping[str, Value]
    shapes: Mapping[str, tuple[int, ...]]
    spans: Mapping[str, tuple[int, int]]

    @property
    def num_layers(self) -> int | None:
        """Layers of the decoder, if the file says how many."""
        found = self.fields.get(f"{self.fields.get('general.architecture')}.block_count")
        return found if isinstance(found, int) and found > 0 else None

    @property
    def num_weights(self) -> int:
        """Elements of all tensors."""
        return sum(map(math.prod, self.shapes.values()))


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that a name stands for: itself, or the only one of a folder without safetensors weights.

    Raises:
        UserError: If the folder has several.
    """
    if path.is_dir():
        if any((path / name).exists() for name in _SAFETENSORS):
            return None
        found = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf" and is_regular(file))
        if len(found) > 1:
            names = ", ".join(file.name for file in found[:5])
            raise UserError(f"{path} holds {len(found)} GGUF files ({names}); name one of them")
        return found[0] if found else None
    return path if is_regular(path) and (path.suffix.lower() == ".gguf" or _begin(path) == _MAGIC) else None


def _begin(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read(len(_MAGIC))


def read_decoder_head(path: Path) -> GgufHead:
    """The head of a GGUF file that is to be a decoder, as `read_head`.

    Raises:
        UserError: As `read_head`; if the `gguf` package is missing, or the file holds a vision tower alone.
    """
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError as error:
        raise UserError(
            f"a GGUF file is read with the gguf package, which is missing here ({error}): "
            "pip install 'compodistill[gguf]'"
        ) from error
    head = read_head(path, {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()})
    if head.fields.get("general.architecture") == _VISION:
        raise UserError(f"{path} holds a vision tower (mmproj); name the GGUF file of the decoder that lies beside it")
    return head


def read_head(path: Path, blocks: Mapping[int, tuple[int, int]]) -> GgufHead:
    """The head of a GGUF file, all of whose tensors lie in it.

    Args:
        path: The file.
        blocks: Kind of a tensor -> elements and bytes of one of its blocks.

    Raises:
        CorruptData: If it is no GGUF file, is not whole, or its head has more than any model's.
        UserError: If it is one part of several.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        reader = _HeadReader(path, file.read(MAX_HEAD_BYTES))
    fields = reader.read_fields()
    if fields.get("split.count", 1) != 1:
        raise UserError(
            f"{path} is one of {fields['split.count']} parts of a GGUF file; put them together first "
            "(llama-gguf-split --merge), and name the whole file"
        )
    shapes, spans = reader.read_tensors(blocks)
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise reader.unusable(f"an alignment of {alignment!r}")
    start = -(-reader.position // alignment) * alignment
    # Without the sum, a hundred thousand tensors could be the same gigabyte.
    placed = {name: (start + begin, start + end) for name, (begin, end) in spans.items()}
    ends, taken = [end for _, end in placed.values()], sum(end - begin for begin, end in placed.values())
    if max(taken, *ends, 0) > size:
        raise CorruptData(
            f"{path} has {size} bytes, fewer than its tensors take; a download or copy that broke off leaves such a "
            "file: fetch it again"
        )
    return GgufHead(fields, shapes, placed)


def read_floats(path: Path, head: GgufHead, name: str) -> tuple[float, ...]:
    """The values of a small tensor of 32-bit floats; empty if it is of another kind."""
    begin, end = head.spans[name]
    count = math.prod(head.shapes[name])
    if end - begin != 4 * count or count > _MAX_COUNT:
        return ()
    with open_regular(path) as file:
        file.seek(begin)
        return struct.unpack(f"<{count}f", file.read(end - begin))


class _HeadReader:
    """Walks over the bytes of a head."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.position = 0
        self._path, self._data, self._entries = path, data, 0
        if data.startswith(b"version https://git-lfs"):
            raise CorruptData(f"{path} is a pointer of Git LFS, not the file itself; fetch it (git lfs pull)")
        if data[:4] != _MAGIC:
            raise CorruptData(f"{path} is no GGUF file: it begins with {data[:4]!r}, not with {_MAGIC!r}")
        self.position = 4
        if (version := self._number("I")) not in _VERSIONS:
            raise self.unusable(f"version {version} where {' or '.join(map(str, _VERSIONS))} is read")
        self._num_tensors, self._num_fields = int(self._number("Q")), int(self._number("Q"))
        if self._num_tensors > _MAX_TENSORS or self._num_fields > _MAX_FIELDS:
            raise self.unusable(f"{self._num_tensors} tensors and {self._num_fields} settings")

    def unusable(self, found: str) -> CorruptData:
        """The refusal of a file with this in its head."""
        return CorruptData(f"{self._path} has {found}, as no GGUF file of a model has; fetch it again")

    def read_fields(self) -> dict[str, Value]:
        """The settings, which come first."""
        fields: dict[str, Value] = {}
        for _ in range(self._num_fields):
            name = self._text()
            if name in fields:
                raise self.unusable(f"two settings {name}")
            most = MAX_ENTRIES if name in _VOCABULARY else _MAX_OTHER_ENTRIES
            fields[name] = value = self._value(int(self._number("I")), most)
            if name.endswith(_COUNTS) and (isinstance(value, str) or not 0 <= value <= _MAX_COUNT):
                raise self.unusable(f"{name} {value!r:.50}, at most {_MAX_COUNT} are made")
        return fields

    def read_tensors(
        self, blocks: Mapping[int, tuple[int, int]]
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, int]]]:
        """Shapes, and where each tensor begins and ends behind the head."""
        shapes: dict[str, tuple[int, ...]] = {}
        spans: dict[str, tuple[int, int]] = {}
        for _ in range(self._num_tensors):
            name, num_dimensions = self._text(), int(self._number("I"))
            if name in shapes or num_dimensions > _MAX_DIMENSIONS:
                raise self.unusable(f"tensor {name} twice, or with {num_dimensions} dimensions")
            shapes[name] = shape = tuple(int(self._number("Q")) for _ in range(num_dimensions))[::-1]
            kind, begin = int(self._number("I")), int(self._number("Q"))
            if kind not in blocks:
                raise self.unusable(f"tensor {name} of kind {kind}, which the gguf package does not know")
            elements, block_bytes = blocks[kind]
            if not shape or shape[-1] % elements:
                raise self.unusable(f"tensor {name} of shape {list(shape)}, which is no whole number of blocks")
            spans[name] = (begin, begin + math.prod(shape) // elements * block_bytes)
        return shapes, spans

    def _take(self, num_bytes: int) -> int:
        """Where so many bytes begin; they are passed."""
        begin = self.position
        if begin + num_bytes > len(self._data):
            what = "more than its bytes" if len(self._data) < MAX_HEAD_BYTES else f"more than {MAX_HEAD_BYTES} bytes"
            raise self.unusable(f"{what} in its head")
        self.position = begin + num_bytes
        return begin

    def _number(self, kind: str) -> int | float | bool:
        begin = self._take(struct.calcsize("<" + kind))
        number: int | float | bool = struct.unpack_from("<" + kind, self._data, begin)[0]
        return number

    def _text(self) -> str:
        length = int(self._number("Q"))
        begin = self._take(length)
        return self._data[begin : begin + length].decode("utf-8", "replace")

    def _value(self, kind: int, max_entries: int) -> Value:
        if kind == _TEXT:
            return self._text()
        if kind != _LIST:
            return self._number(self._format(kind))
        kind, count = int(self._number("I")), int(self._number("Q"))
        self._entries += count
        if count > max_entries or self._entries > MAX_ENTRIES:
            raise self.unusable(f"a list of {count} entries, or more than {MAX_ENTRIES} in all")
        if kind == _TEXT:
            for _ in range(count):
                self._take(int(self._number("Q")))
        else:
            self._take(count * struct.calcsize("<" + self._format(kind)))
        return count

    def _format(self, kind: int) -> str:
        if kind not in _FORMATS:
            raise self.unusable(f"a value of kind {kind}")
        return _FORMATS[kind]
