"""Special tokens written in the text of a turn are text: they are broken before a template sees them, and read whole.

What tells the template's own special tokens from those of the text is where they come from. So each one of the text
gets a character inside it, which neither template nor processor takes for a token; one of a single character becomes
another character. A copy of the tokenizer then knows the special tokens under other names only, and these are given to
those of the template. It reads texts, too, that a normalizer makes a special token of, such as one in capitals.
"""

import copy
import re
from functools import cached_property
from typing import Any, Final

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from stages.conversations.answer_spans import untrimmed
from stages.conversations.chat_templates import ChatTemplate
from stages.conversations.messages import Message, text_part
from stages.unusable_sample import UnusableSample

_BREAK: Final = "\ufdd0"
"""Stands in a special token of a turn's text, after its first character."""
_REAL: Final = "\ufdd1"
"""Begins the other name of a special token."""
_STAND_INS: Final = [chr(number) for number in range(0xFDD2, 0xFDF0)]
"""Stand in a turn's text for special tokens of one character."""
_RESERVED: Final = re.compile("[\ufdd0-\ufdef]")
"""All of these. Unicode keeps them from being used in texts."""


class SpecialTokens:
    """The special tokens of a tokenizer as a template uses them; several threads may use it.

    They are those that the tokenizer calls special, and of its other added tokens those of several characters that the
    template writes in one of its trials and that are no words, such as `<|im_end|>` in some checkpoints. Those of one
    character that the vocabulary holds are left out, such as `!` as padding: they are the tokens of plain text too.

    Args:
        tokenizer: A fast one.
        template: Of the same processor.
        image_tokens: What stands for an image in a text, and at the positions of its features.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate, image_tokens: set[str]) -> None:
        self._tokenizer = tokenizer
        in_vocabulary = tokenizer.backend_tokenizer.model.token_to_id
        self._added: dict[int, AddedToken] = {
            number: token
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.content in image_tokens
            or (token.special and (len(token.content) > 1 or in_vocabulary(token.content) is None))
            or _is_control(token.content, template.trials)
        }
        names = sorted({*image_tokens, *(token.content for token in self._added.values())}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names)))
        self._stand_ins = dict(zip((name for name in names if len(name) == 1), _STAND_INS, strict=False))
        self._stood_for = {stand_in: name for name, stand_in in self._stand_ins.items()} | {_BREAK: ""}
        self._normalizer = tokenizer.backend_tokenizer.normalizer
        # White space, which normalizers put before a text, may be there or not.
        normal = {self._normalized(name).strip(" \u2581") for name in names if self._normalizer is not None} - {""}
        self._normal_pattern = re.compile("|".join(map(re.escape, sorted(normal))) or "(?!)")
        written = self._pattern.match(template.after_answer.lstrip())
        self._template_ends = written is not None
        ends = {tokenizer.eos_token, written[0] if written else None} - {None}
        self._ends = re.compile(rf"(?:(?:{'|'.join(map(re.escape, ends)) or '(?!)'})\s*)+\Z")

    def is_end(self, text: str) -> bool:
        """Whether the text of an answer is nothing but end tokens, which the template writes itself."""
        return self._ends.fullmatch(text.lstrip()) is not None

    def guarded(self, messages: list[Message]) -> tuple[list[Message], bool]:
        """The messages with each special token of their texts broken, and whether there was one or a text becomes one.

        Of an answer that ends in an end token, that token is the one which the template writes: it is not said twice.

        Raises:
            UnusableSample: If there is one beside a text, of any turn, with a character that breaks them.
        """
        any_broken, any_reserved, result = False, False, []
        for message in messages:
            parts = []
            for part in message["content"]:
                if part["type"] == "text":
                    text, broken = self._guarded(part["text"], is_answer=message["role"] == "assistant")
                    any_broken |= broken
                    any_reserved |= _RESERVED.search(part["text"]) is not None
                    part = text_part(text)
                parts.append(part)
            result.append({**message, "content": parts})
        if any_broken and any_reserved:
            detail = "beside a special token in a text there is one of U+FDD0 to U+FDEF, which are no characters"
            raise UnusableSample("special_token_in_text", detail)
        return result, any_broken

    def encode(self, text: str, add_special_tokens: bool) -> tuple[Tensor, Tensor]:
        """Tokens of a rendered text in which special tokens are broken.

        Returns:
            `[T]` int64 token ids, and `[T, 2]` int64 first and last character of each in `text`, the last excluded.

        Raises:
            UnusableSample: If the tokenizer makes a special token of plain text, or does not make one that is meant.
        """
        tokenizer, ids = self._renamed
        real = {match.start() for match in self._pattern.finditer(text)}
        # Characters that the tokenizer sees, each with its position in `text`.
        chars: list[tuple[str, int]] = []
        for position, char in enumerate(text):
            if position in real:
                chars.append((_REAL, position))
            if own := self._stood_for.get(char, char):
                chars.append((own, position))
        encoding = tokenizer.encode("".join(char for char, _ in chars), add_special_tokens=add_special_tokens)
        befores = [0, *(position + 1 for _, position in chars)]
        offsets = [(chars[a][1] if a < b else befores[b], befores[b]) for a, b in encoding.offsets]
        spelled = [i for i, (a, b) in zip(encoding.ids, encoding.offsets, strict=True) if a < b and i in self._added]
        if spelled or sum(number in ids for number in encoding.ids) != len(real):
            names = ", ".join({self._added[number].content for number in spelled})
            found = f"the tokenizer cannot tell {names or 'its special tokens'} from the same characters in a text"
            raise UnusableSample("special_token_in_text", found)
        token_ids = [ids.get(number, number) for number in encoding.ids]
        return torch.tensor(token_ids), torch.tensor(offsets).view(-1, 2)

    @cached_property
    def _renamed(self) -> tuple[Tokenizer, dict[int | None, int]]:
        """The tokenizer with its special tokens under other names, and the ids that these stand for."""
        own = self._tokenizer.backend_tokenizer
        tokenizer = untrimmed(own) or copy.deepcopy(own)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Those called special are then read as text. The others get the same, the new names are not special.
        tokenizer.encode_special_tokens = True
        tokenizer.add_special_tokens([_copy(token, token.content, special=True) for token in self._added.values()])
        names = {number: _REAL + token.content for number, token in self._added.items()}
        tokenizer.add_tokens([_copy(token, names[number], special=False) for number, token in self._added.items()])
        return tokenizer, {tokenizer.token_to_id(name): number for number, name in names.items()}

    def _guarded(self, text: str, *, is_answer: bool) -> tuple[str, bool]:
        end = ""
        if is_answer and (found := self._ends.search(text)) is not None:
            text, end = text[: found.start()], "" if self._template_ends else found[0]
        broken = any(p.search(t) for p, t in ((self._pattern, text), (self._normal_pattern, self._normalized(text))))
        while self._pattern.search(text):
            text = self._pattern.sub(self._broken, text)
        return text + end, broken

    def _broken(self, match: re.Match[str]) -> str:
        first, rest = match[0][0], match[0][1:]
        if rest:
            return first + _BREAK + rest
        if first not in self._stand_ins:
            detail = f"{first!a} is one, beyond the {len(_STAND_INS)} of one character that can be told from a text"
            raise UnusableSample("special_token_in_text", detail)
        return self._stand_ins[first]

    def _normalized(self, text: str) -> str:
        return text if self._normalizer is None else str(self._normalizer.normalize_str(text))


def _is_control(content: str, trials: list[str]) -> bool:
    word = content.strip()
    return len(content) > 1 and bool(word) and not word.isalpha() and any(content in trial for trial in trials)


def _copy(token: AddedToken, content: str, *, special: bool) -> AddedToken:
    rules = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
    return AddedToken(content, special=special, **rules)
