"""What each token id of a tokenizer stands for: bytes of text, or a name where it stands for none.

Tokens of two tokenizers are the same where these are the same, however each marks the beginning of a word.
"""

import json
import re
from functools import cache
from typing import Any

from tokenizers import Tokenizer

from storage.errors import UserError

TokenNames = tuple[bytes | str | None, ...]
"""Of each id its bytes, the name of a special token, or None of an id without a token."""

END: str = "\0end"
"""Names the token that ends an answer, in every tokenizer."""
_WORD_MARK = "\u2581"
"""Is a space in tokens of SentencePiece."""
_BYTE = re.compile("<0x([0-9A-F]{2})>")


def token_names(tokenizer: Tokenizer, end: int | None, whose: str) -> TokenNames:
    """The names of all ids.

    Args:
        tokenizer: Byte-level, or in the manner of SentencePiece: these spell white space out.
        end: The token that ends an answer; None where there is none, or none that is always the same.
        whose: The tokenizer, for errors.

    Raises:
        UserError: If it is another kind of tokenizer, whose tokens do not say where words begin.
    """
    rules = json.loads(tokenizer.to_str())
    decoder = json.dumps(rules["decoder"], ensure_ascii=False)
    if '"ByteLevel"' in decoder:
        read = _of_byte_level
    elif _WORD_MARK in decoder:
        read = _of_sentencepiece
    else:
        found = f"its decoder is {decoder:.100}, expected a byte-level one or one that reads {_WORD_MARK!r} as a space"
        raise UserError(
            f"the text of single tokens is not known of the tokenizer of {whose}: {found}; set kd_weight to 0 in every "
            "stage that is trained"
        )
    added: dict[int, Any] = tokenizer.get_added_tokens_decoder()
    ids = tokenizer.get_vocab(with_added_tokens=True)
    names: list[bytes | str | None] = [None] * (max(ids.values(), default=-1) + 1)
    for token, number in ids.items():
        names[number] = read(token)
    for number, one in added.items():
        names[number] = one.content if one.special else one.content.encode()
    if end is not None:
        names[end] = END
    return tuple(names)


@cache
def _bytes_of_characters() -> dict[str, int]:
    """The byte of each character of a byte-level token: its own code where it is printable, others from 256 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


def _of_byte_level(token: str) -> bytes | None:
    table = _bytes_of_characters()
    return bytes(table[char] for char in token) if all(char in table for char in token) else None


def _of_sentencepiece(token: str) -> bytes:
    found = _BYTE.fullmatch(token)
    return bytes.fromhex(found[1]) if found else token.replace(_WORD_MARK, " ").encode()
