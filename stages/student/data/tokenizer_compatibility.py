"""A student's tokenizer beside the teacher's: where their token ids differ, and a processor with the student's own."""

import tempfile
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer, ProcessorMixin

from stages.checkpoints.processors import load_processor, load_tokenizer
from stages.conversations.chat_templates import chat_template, with_image_parts
from stages.student.data.vocabularies import read_vocabulary, summary, vocabulary_differences
from storage.errors import UserError


def tokenizer_differences(processor: ProcessorMixin, student_folder: Path) -> list[str]:
    """Compares what token ids mean to the teacher with that processor, and to a student or its decoder.

    Ids that only one side has are no difference. The data's ids are checked against the student's vocabulary when they
    are used, and the logit loss leaves out those that it lacks. The two may split texts differently, because no text is
    split again.

    Returns:
        One line for vocabulary entries and one for added tokens, each with an example; empty if all ids agree.

    Raises:
        UserError: If there is no `tokenizer.json` to compare with, or it is damaged.
    """
    student, tokenizer = read_vocabulary(student_folder), processor.tokenizer
    # Features replace the image token and padding is masked: no student reads these ids.
    unread = {getattr(processor, "image_token_id", None), tokenizer.pad_token_id} - {tokenizer.eos_token_id}
    teacher = tokenizer.backend_tokenizer
    return summary(vocabulary_differences(teacher, student, unread), teacher)


def student_processor(teacher: ProcessorMixin, decoder: Path, image_token: str) -> ProcessorMixin:
    """The teacher's processor with the decoder's tokenizer and chat template in it.

    The special tokens that the teacher's processor names (the image token, in some families also those around it) are
    added to the tokenizer, and `image_token`, which features replace: in some families the placeholder in a text is
    another. It may lie past the decoder's vocabulary, because no student embeds it.

    Raises:
        UserError: If the decoder's tokenizer does not fit a processor of the teacher's class.
    """
    tokenizer = load_tokenizer(decoder)
    named = {
        name: str(token)
        for name, token in teacher.tokenizer.special_tokens_map.items()
        if name not in tokenizer.SPECIAL_TOKENS_ATTRIBUTES and isinstance(token, str)
    }
    named.setdefault("image_token", teacher.image_token)
    added = dict.fromkeys([*named.values(), image_token])
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        teacher.save_pretrained(folder)
        for file in folder.glob("tokenizer*"):
            file.unlink()
        tokenizer.save_pretrained(folder)
        # Loaded again with the names by which some processors find their tokens.
        renamed = AutoTokenizer.from_pretrained(folder, extra_special_tokens=named, trust_remote_code=False)
        renamed.chat_template = None
        renamed.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(student_template(teacher, tokenizer))
        try:
            return load_processor(folder)
        except UserError as error:
            raise UserError(
                f"the tokenizer of {decoder} cannot be used in a {type(teacher).__name__}: {error.__cause__}; "
                "choose a student with the teacher's tokenizer"
            ) from error


def student_template(teacher: ProcessorMixin, tokenizer: Any) -> str:
    """The decoder's own chat template, if it can be used with images; else the teacher's."""
    if tokenizer.chat_template:
        own, image = tokenizer.get_chat_template(), teacher.image_token
        if found := with_image_parts(own, tokenizer.special_tokens_map, image, f"{image}\n"):
            return found[0]
    return chat_template(teacher)
