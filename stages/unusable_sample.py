"""Why a sample cannot be used: the list of all reasons, and the exception that carries one of them."""

import re
from typing import Literal

from storage.errors import UserError

_OfRecord = Literal[
    "bad_id",
    "bad_image_field",
    "bad_json_line",
    "line_too_long",
    "not_an_object",
    "not_utf8",
    "unknown_layout",
    "unread_field",
]
_OfTurns = Literal[
    "answer_missing", "bad_turn", "empty_conversation", "question_missing", "unknown_role", "wrong_turn_order"
]
_OfPlaceholders = Literal["image_without_placeholder", "placeholder_misplaced", "placeholder_without_image"]
_OfImage = Literal[
    "broken_image", "empty_image", "image_too_large", "missing_image", "path_leaves_folder", "unsupported_image"
]
ReasonOfText = Literal[
    "refused_by_processor",
    "refused_by_template",
    "template_not_prefix_stable",
    "image_count_mismatch",
    "special_token_in_text",
]
_OfLength = Literal[
    "image_beyond_max_length",
    "no_answer_within_max_length",
    "prompt_beyond_max_length",
    "too_long",
    "too_many_image_tokens",
]
_OfTeacher = Literal["kills_worker", "not_finite", "out_of_memory", "teacher_error"]

Reason = Literal[_OfRecord, _OfTurns, _OfPlaceholders, _OfImage, ReasonOfText, _OfLength, _OfTeacher]
"""The words that ledgers and reports count by."""


class UnusableSample(UserError):
    """A sample that is not used: `reason` is the ledger's word for it, `detail` says what was found."""

    def __init__(self, reason: Reason, detail: str) -> None:
        detail = without_addresses(detail)
        super().__init__(reason, detail)
        self.reason: Reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def without_addresses(text: str) -> str:
    """A library's message without the memory addresses of its objects: the same fault must give the same ledger."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)
