"""Why a sample cannot be used: the list of all reasons, and the exception that carries one of them."""

from typing import Literal

from storage.errors import UserError

_OfRecord = Literal[
    "bad_id", "bad_image_field", "bad_json_line", "duplicate_id", "line_too_long", "not_an_object", "not_utf8"
]
_OfTurns = Literal[
    "answer_missing", "bad_turn", "empty_conversation", "question_missing", "unknown_role", "wrong_turn_order"
]
_OfPlaceholders = Literal["image_without_placeholder", "placeholder_misplaced", "placeholder_without_image"]
_OfImage = Literal["broken_image", "image_too_large", "missing_image", "path_leaves_folder", "unsupported_image"]
_OfText = Literal["refused_by_processor", "refused_by_template", "template_not_prefix_stable", "image_count_mismatch"]
_OfLength = Literal["image_beyond_max_length", "no_answer_within_max_length", "prompt_beyond_max_length", "too_long"]
_OfTeacher = Literal["kills_worker", "not_finite", "out_of_memory", "teacher_error"]

Reason = Literal[_OfRecord, _OfTurns, _OfPlaceholders, _OfImage, _OfText, _OfLength, _OfTeacher]
"""The words that ledgers and reports count by."""


class UnusableSample(UserError):
    """A sample that is not used: `reason` is the ledger's word for it, `detail` says what was found."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason: Reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"
