"""A byte-level tokenizer as llama.cpp reads it from a GGUF file; one that it would read wrongly is refused."""

import json
from dataclasses import dataclass
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from storage.errors import UserError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN_2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_LLAMA_3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_WHOLE = ("ByteLevel", False, False)
_GPT_2 = ("ByteLevel", False, True)

_KINDS: Final[dict[tuple[Any, ...], tuple[str, bool]]] = {
    (("Split", _QWEN_2), _WHOLE): ("qwen2", False),
    (("Split", _LLAMA_3), _WHOLE): ("llama-bpe", True),
    (("Digits", True), _GPT_2): ("smollm", False),
    (_GPT_2,): ("gpt-2", False),
}
"""Steps that split a text -> llama.cpp's name for them, and whether it takes a word that is a token as it is."""

_MAX_ENDS = 3
"""A GGUF file names this many tokens that end an answer."""


@dataclass(frozen=True)
class GgufTokenizer:
    """What a GGUF file says of a tokenizer."""

    pre: str
    """`tokenizer.ggml.pre`."""
    tokens: list[str]
    """One for each of the V rows of the vocabulary."""
    types: list[int]
    merges: list[str]
    special_ids: dict[str, int]
    """By the names that `GGUFWriter` has for them: bos, eos, eot, eom, pad, unk."""


def read_tokenizer(tokenizer: PreTrainedTokenizerBase, num_rows: int, end_ids: list[int]) -> GgufTokenizer:
    """What to write of a tokenizer.

    Args:
        tokenizer: With a chat template.
        num_rows: Rows of the decoder's vocabulary; those without a token are named as unused.
        end_ids: Tokens that end an answer.

    Raises:
        UserError: If llama.cpp would read text differently, or there are more than three `end_ids`.
    """
    from gguf import TokenType

    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    pre, model = _pre_tokenizer(rules), rules["model"]
    if len(end_ids) > _MAX_ENDS:
        raise UserError(f"answers end with any of the tokens {end_ids}, a GGUF file names at most {_MAX_ENDS}")
    tokens = [f"[PAD{row}]" for row in range(num_rows)]
    types = [int(TokenType.UNUSED)] * num_rows
    for token, row in model["vocab"].items():
        tokens[row], types[row] = token, int(TokenType.NORMAL)
    for added in rules["added_tokens"]:
        row, kind = added["id"], TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[row], types[row] = added["content"], int(kind)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    first = tokenizer.eos_token_id if tokenizer.eos_token_id in end_ids else end_ids[0]
    ends = dict(zip(("eos", "eot", "eom"), [first, *(end for end in end_ids if end != first)], strict=False))
    named = {"bos": tokenizer.bos_token_id, "pad": tokenizer.pad_token_id, "unk": tokenizer.unk_token_id}
    special = ends | {name: number for name, number in named.items() if number is not None}
    return GgufTokenizer(pre, tokens, types, merges, special)


def _pre_tokenizer(rules: dict[str, Any]) -> str:
    """llama.cpp's name for how the tokenizer splits text."""
    model, normalizer = rules["model"], (rules["normalizer"] or {}).get("type")
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise _refused(f"is a {model['type']}{' of SentencePiece' * bool(model.get('byte_fallback'))}")
    if normalizer not in (None, "NFC"):
        raise _refused(f"changes text first ({normalizer})")
    if given := [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]:
        raise _refused(f"has {', '.join(given)}")
    strips = [added["content"] for added in rules["added_tokens"] if _takes_its_neighbours(added)]
    if strips:
        raise _refused(f"takes the spaces or letters beside {', '.join(strips[:5])} into account")
    top = rules["pre_tokenizer"] or {"type": "none"}
    parts = tuple(map(_step, top["pretokenizers"] if top["type"] == "Sequence" else [top]))
    if parts not in _KINDS:
        raise _refused(f"splits text by {json.dumps(top)[:300]}")
    name, words_first = _KINDS[parts]
    if bool(model.get("ignore_merges")) != words_first:
        raise _refused(f"splits text as {name}, with ignore_merges {not words_first} where llama.cpp has {words_first}")
    return name


def _takes_its_neighbours(added: dict[str, Any]) -> bool:
    # llama.cpp puts pictures where the image token is, and reads no text there.
    return added["content"] != "<image>" and any(added[name] for name in ("lstrip", "rstrip", "single_word"))


def _step(step: dict[str, Any]) -> tuple[Any, ...]:
    """One step of a pre-tokenizer, in a form that can be looked up."""
    if step["type"] == "ByteLevel":
        return "ByteLevel", step["add_prefix_space"], step.get("use_regex", True)
    if step["type"] == "Digits":
        return "Digits", step["individual_digits"]
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return "Split", step["pattern"].get("Regex")
    return ("another",)


def _refused(found: str) -> UserError:
    names = ", ".join(name for name, _ in _KINDS.values())
    return UserError(
        f"the tokenizer {found}, which is not known to be the same in llama.cpp, so that words could become other "
        f"tokens than the student learned; a GGUF file is written for byte-level BPE tokenizers of the kinds {names}. "
        "Leave out --format gguf"
    )
