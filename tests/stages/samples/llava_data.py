"""Small LLaVA data sets, good and bad, written to a folder."""

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

from PIL import Image


def image_bytes(colour: int = 0, kind: str = "PNG", size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (colour % 256, 40, 90)).save(buffer, kind)
    return buffer.getvalue()


def bomb_png(width: int = 60_000, height: int = 60_000) -> bytes:
    """A PNG of under a hundred bytes whose header promises billions of pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def record(sample_id: Any, image: Any = None, question: str = "What is it?", answer: str = "A cube.") -> dict[str, Any]:
    """A good record; one placeholder for each image."""
    num_images = len(image) if isinstance(image, list) else int(image is not None)
    made = {"id": sample_id, "conversations": turns("<image>\n" * num_images + question, answer)}
    return made if image is None else {**made, "image": image}


class LlavaFolder:
    """A data file and an image folder under one root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images = root / "images"
        self.images.mkdir()
        for name, kind in (("a.jpg", "JPEG"), ("b.png", "PNG"), ("deep/c.webp", "WEBP")):
            self.add_image(name, image_bytes(ord(name[0]), kind))

    def add_image(self, name: str, data: bytes) -> None:
        path = self.images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def write_json(self, records: list[Any], name: str = "data.json") -> Path:
        path = self.root / name
        path.write_text(json.dumps(records), encoding="utf-8")
        return path

    def write_lines(self, lines: list[bytes], name: str = "data.jsonl") -> Path:
        path = self.root / name
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path
