"""The scenes' tokenizer, chat template and processor, built offline: one token a word.

Models of this example share them, so a student reads the teacher's answer logits without any mapping.
"""

from __future__ import annotations

import re
from functools import lru_cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from examples.scenes.patches import PATCH_SIZE
from pipeline.demo.scenes.world import COLOURS, DIGITS, IMAGE_SIZE, RELATIONS, SHAPES, SIZES

PAD, EOS, UNKNOWN, IMAGE = "<pad>", "<eos>", "<unk>", "<image>"
SPECIAL = (PAD, EOS, UNKNOWN, IMAGE)
_SPACE = "▁"
_PUNCTUATION = (".", "?", ":")
_LINE = "\n"
_WORDS = (
    *SHAPES, *DIGITS, *COLOURS, *SIZES, *RELATIONS,
    "USER", "ASSISTANT", "A", "B", "Answer", "Describe", "How", "Is", "What", "Where", "Which",
    "a", "after", "an", "and", "are", "at", "bottom", "caption", "center", "colour", "comes", "fits", "from",
    "image", "in", "is", "many", "middle", "no", "not", "number", "object", "objects", "of", "opposite", "or",
    "shape", "the", "there", "top", "with", "yes",
)  # fmt: skip
VOCABULARY = (
    *SPECIAL,
    _SPACE,
    *_PUNCTUATION,
    _SPACE + _LINE,
    *(_SPACE + mark for mark in _PUNCTUATION),
    _LINE,
    *(_SPACE + word for word in _WORDS),
)

CHAT_TEMPLATE = """\
{%- macro said(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{ 'USER: ' + said(message['content']) + ' ASSISTANT:' }}
{%- elif message['role'] == 'assistant' -%}
{%- generation -%}{{ ' ' + said(message['content']) + eos_token }}{%- endgeneration -%}
{%- else -%}
{{ said(message['content']) + ' ' }}
{%- endif -%}
{%- endfor -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; words carry their leading space, so that decoding gives the text back."""
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    # A line break is a word like any other, and so is the word after it.
    tokenizer.normalizer = normalizers.Replace("\n", " \n ")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always"),
            pre_tokenizers.Split(Regex(r"[.?:]"), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")
    tokenizer.add_special_tokens([AddedToken(t, special=True, lstrip=t == IMAGE) for t in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=1024,
        padding_side="right",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_processor() -> LlavaProcessor:
    """The teacher's processor: 48x48 images, one image token a patch."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    # The PIL backend is named, so that the pixels do not depend on whether torchvision is installed.
    images = SiglipImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE,
        num_additional_image_tokens=0,
        vision_feature_select_strategy="full",
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


_INDEX = {token: index for index, token in enumerate(VOCABULARY)}


@lru_cache(maxsize=1 << 16)
def word_ids(text: str) -> tuple[int, ...]:
    """What the tokenizer gives for a text within the scenes' language, only faster."""
    return tuple(_INDEX[part if part in _PUNCTUATION else _SPACE + part] for part in re.findall(r"[.?:\n]|\w+", text))
