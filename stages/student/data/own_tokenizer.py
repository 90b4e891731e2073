"""The processor of a student that sees with the teacher's eyes and reads with a tokenizer of its own."""

import tempfile
from pathlib import Path
from typing import Any

import jinja2
from transformers import AddedToken, AutoTokenizer, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from stages.checkpoints import load_processor, load_tokenizer
from stages.conversations.chat_templates import chat_template
from storage.errors import UserError

_FLATTEN = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set turn = namespace(text='') -%}
{%- if message['content'] is string -%}{%- set turn.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{%- set turn.text = turn.text + IMAGE + '\\n' -%}
{%- else -%}{%- set turn.text = turn.text + part['text'] -%}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': turn.text}] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
"""Goes before the template of a language model, which takes the content of a turn for a plain string."""


def students_processor(teacher: ProcessorMixin, decoder: Path) -> ProcessorMixin:
    """The teacher's processor with the decoder's tokenizer and chat template in it.

    The teacher's special tokens that its processor names (image, and in some families what stands around it) are added
    to the tokenizer. The image's may lie past the decoder's vocabulary, as no student reads it. The template is the
    decoder's own if it has one, made to write images; else the teacher's.

    Raises:
        UserError: the decoder's tokenizer cannot take part in a processor of the teacher's class.
    """
    tokenizer = load_tokenizer(decoder)
    named = {
        name: str(token)
        for name, token in teacher.tokenizer.special_tokens_map.items()
        if name not in tokenizer.SPECIAL_TOKENS_ATTRIBUTES and isinstance(token, str)
    }
    named.setdefault("image_token", teacher.image_token)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in named.values()])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        teacher.save_pretrained(folder)
        for file in folder.glob("tokenizer*"):
            file.unlink()
        tokenizer.save_pretrained(folder)
        # Loaded again with the names, by which some processors find their tokens.
        renamed = AutoTokenizer.from_pretrained(folder, extra_special_tokens=named, trust_remote_code=False)
        renamed.chat_template = None
        renamed.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(students_template(teacher, tokenizer))
        try:
            return load_processor(folder)
        except UserError as error:
            raise UserError(
                f"the tokenizer of {decoder} cannot be used in a {type(teacher).__name__}: {error.__cause__}; "
                "choose a student with the teacher's tokenizer"
            ) from error


def students_template(teacher: ProcessorMixin, tokenizer: Any) -> str:
    """The decoder's own chat template, where it has one that can be made to write images; else the teacher's."""
    own = tokenizer.get_chat_template() if tokenizer.chat_template else None
    if own is None:
        return chat_template(teacher)
    image = teacher.image_token
    flattening = _FLATTEN.replace("IMAGE", repr(image)) + own
    for template in (own, flattening):
        if writes_images(template, image, tokenizer.special_tokens_map):
            return str(template)
    return chat_template(teacher)


def writes_images(template: str, image_token: str, special_tokens: dict[str, str]) -> bool:
    """Whether a chat template renders a turn made of an image and a text as it should."""
    question = [{"type": "image"}, {"type": "text", "text": "a question"}]
    turns = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": "an answer"}]},
    ]
    try:
        (text,), _ = render_jinja_template(conversations=[turns], chat_template=template, **special_tokens)
    except (jinja2.TemplateError, TypeError):
        return False
    written = all(words in text for words in ("a question", "an answer")) and "'text'" not in text
    return written and text.count(image_token) == 1
