"""Builds tiny random checkpoints and LLaVA data sets on disk, offline, for the tests.

The models are real ones (`LlavaForConditionalGeneration`, `Qwen2ForCausalLM`) of at most 100,000 weights;
each builder returns a folder that `from_pretrained` reads. Equal arguments give equal weights.
"""

import json
import random
import re
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

IMAGE_TOKEN = "<image>"
EOS_TOKEN = "<|endoftext|>"

CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}{{- content -}}
{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{- render(message['content']) + ' ' -}}
{%- elif message['role'] == 'user' -%}{{- 'USER: ' + render(message['content']) + ' ' -}}
{%- else -%}
{{- 'ASSISTANT:' -}}
{%- generation -%}{{- ' ' + render(message['content']) + eos_token -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
"""`USER: <image>\\n... ASSISTANT: ...<eos>`, an answer's span starting right after the colon."""

CHAT_TEMPLATE_WITHOUT_GENERATION = re.sub(r"\{%- (end)?generation -%\}", "", CHAT_TEMPLATE)

CHAT_TEMPLATE_OF_LLAVA_1_5 = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""As the library's checkpoints of LLaVA-1.5 have it: an answer ends with a space."""

CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
"""As language models have it: the content of a turn is a string."""

_TOKENIZER_TEXT = (
    "USER: What is the color of the square? ASSISTANT: The square is red.",
    "USER: Describe the image. ASSISTANT: A blue circle is left of a green triangle.",
    "USER: Which caption fits the image? A: a red square above a blue circle B: a blue square",
    "USER: Answer with A or B. ASSISTANT: A",
)


def make_tiny_llava(
    folder: Path,
    *,
    num_layers: int = 6,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    extra_vocab: int = 0,
    image_size: int = 32,
    patch_size: int = 8,
    seed: int = 0,
    chat_template: str = CHAT_TEMPLATE,
) -> Path:
    """A LLaVA of `num_layers` decoder layers with `(image_size / patch_size) ** 2` image tokens (16).

    `extra_vocab` output rows have no token in the tokenizer, as in models with a padded vocabulary.
    """
    tokenizer = _train_tokenizer()
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    text_config = Qwen2Config(
        vocab_size=len(tokenizer) + extra_vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        initializer_range=0.25,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision_config = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=patch_size,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=image_token_id,
        image_seq_length=(image_size // patch_size) ** 2,
        vision_feature_select_strategy="full",
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    processor = LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": image_size, "width": image_size}),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="full",
        chat_template=chat_template,
    )
    processor.save_pretrained(folder)
    return folder


def make_tiny_llava_without_generation_block(folder: Path, *, seed: int = 0, num_layers: int = 6) -> Path:
    """The same LLaVA, its chat template lacking `{% generation %}`: what most published checkpoints ship."""
    return make_tiny_llava(folder, seed=seed, num_layers=num_layers, chat_template=CHAT_TEMPLATE_WITHOUT_GENERATION)


def make_tiny_lm(
    folder: Path,
    *,
    tokenizer_from: Path,
    num_layers: int = 4,
    hidden: int = 24,
    heads: int = 4,
    kv_heads: int = 2,
    vocab_size: int | None = None,
    seed: int = 1,
) -> Path:
    """A student's language model with the tokenizer of the checkpoint `tokenizer_from`.

    `vocab_size` is the number of output rows: one a token by default; fewer cut the last ids, more only pad.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
    config = Qwen2Config(
        vocab_size=len(tokenizer) if vocab_size is None else vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        initializer_range=0.25,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_foreign_lm(folder: Path, chat_template: str | None = None, num_layers: int = 6) -> Path:
    """A decoder whose tokenizer was trained on other text: most ids mean something else than to the teacher."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=["</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a triangle stands under the circle", "green is the square"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")
    fast.chat_template = chat_template
    config = Qwen2Config(
        vocab_size=len(fast),
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.25,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def load_tiny_llava(folder: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Model (eval mode, float32) and processor of a folder made by `make_tiny_llava`."""
    return LlavaForConditionalGeneration.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def make_llava_data(folder: Path, n: int, seed: int = 0) -> tuple[Path, Path]:
    """`n` LLaVA samples in `folder/data.json` over PNG and JPEG files in `folder/images`; returns both paths.

    Samples come in fives: one turn; several turns; two conversations on that same image; text only.
    """
    rng = random.Random(seed)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    samples: list[dict[str, object]] = []
    image = ""
    for number in range(n):
        kind = number % 5
        if kind < 2:
            image = f"{number:06d}.{'png' if kind == 0 else 'jpg'}"
            draw_random_image(rng).save(images / image)
        conversations = [_turn_pair(rng, with_image=kind != 4)]
        if kind in (1, 3):
            conversations += [_turn_pair(rng, with_image=False) for _ in range(rng.randint(1, 2))]
        sample: dict[str, object] = {"id": f"sample-{number:06d}"}
        if kind != 4:
            sample["image"] = image
        sample["conversations"] = [turn for pair in conversations for turn in pair]
        samples.append(sample)
    path = folder / "data.json"
    path.write_text(json.dumps(samples, indent=1))
    return path, images


def draw_random_image(rng: random.Random) -> Image.Image:
    """A small RGB image of random size with a few coloured shapes."""
    image = Image.new("RGB", (rng.randint(24, 64), rng.randint(24, 64)), _color(rng))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        left, top = rng.randint(0, image.width - 8), rng.randint(0, image.height - 8)
        box = (left, top, left + rng.randint(4, 16), top + rng.randint(4, 16))
        rng.choice([draw.rectangle, draw.ellipse])(box, fill=_color(rng))
    return image


def _turn_pair(rng: random.Random, *, with_image: bool) -> list[dict[str, str]]:
    shape, color = rng.choice(["square", "circle", "triangle"]), rng.choice(["red", "green", "blue"])
    question = f"What is the color of the {shape}?"
    if with_image:
        question = rng.choice(["<image>\n{}", "{}\n<image>"]).format(question)
    return [{"from": "human", "value": question}, {"from": "gpt", "value": f"The {shape} is {color}."}]


def _color(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def _train_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=[EOS_TOKEN, "<|pad|>", IMAGE_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TOKENIZER_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token="<|pad|>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )
