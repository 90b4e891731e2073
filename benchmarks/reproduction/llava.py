"""The miniature as the product reads it: checkpoints in stock classes, one token a word, questions as LLaVA records."""

import json
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from benchmarks.reproduction.model import Answerer, LocalTower, text_config
from benchmarks.reproduction.scenes import BEGIN, CELL, END, IMAGE, IMAGE_SIZE, NUM_CELLS, PAD, WORDS, Scenes, ask
from benchmarks.reproduction.tower import rendered

CHAT_TEMPLATE = f"""\
{{%- for message in messages -%}}
{{%- if message['role'] == 'assistant' -%}}
{{%- generation -%}}{{{{ message['content'][0]['text'] }}}}{{%- endgeneration -%}}
{{%- else -%}}
{{%- for part in message['content'] if part['type'] == 'image' -%}}{{{{ '{BEGIN}{IMAGE}{END}' }}}}{{%- endfor -%}}
{{%- for part in message['content'] if part['type'] == 'text' -%}}{{{{ part['text'] + ' ' }}}}{{%- endfor -%}}
{{%- endif -%}}
{{%- endfor -%}}
"""
"""`<begin><image><end>colour square ? red`. An answer is one word, so it has no end."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, with the ids that the miniature's decoders have."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), behavior="removed")
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (PAD, BEGIN, END, IMAGE)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=PAD, padding_side="right",
        extra_special_tokens={"image_token": IMAGE}, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def build_processor() -> LlavaProcessor:
    """One image token a cell; pixels as the local tower scales them."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    # The PIL backend is named, so that the pixels do not depend on whether torchvision is installed.
    images = SiglipImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        image_processor=images, tokenizer=build_tokenizer(), patch_size=CELL, num_additional_image_tokens=0,
        vision_feature_select_strategy="full", image_token=IMAGE, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def build_llava(tower: LocalTower, answerer: Answerer) -> LlavaForConditionalGeneration:
    """A stock Llava of the same weights."""
    config = LlavaConfig(
        vision_config=tower.siglip.config, text_config=text_config(answerer.size), image_token_index=WORDS.index(IMAGE),
        image_seq_length=NUM_CELLS, vision_feature_layer=-1, vision_feature_select_strategy="full",
        projector_hidden_act="gelu", tie_word_embeddings=False, pad_token_id=WORDS.index(PAD),
        eos_token_id=WORDS.index(END),
    )  # fmt: skip
    llava = LlavaForConditionalGeneration(config)
    projector = llava.model.multi_modal_projector
    _copy(tower.siglip, llava.model.vision_tower)
    _copy(answerer.adapter[0], projector.linear_1)
    _copy(answerer.adapter[2], projector.linear_2)
    _copy(answerer.decoder, llava.model.language_model)
    _copy(answerer.head, llava.lm_head)
    return llava


def _copy(source: nn.Module, target: nn.Module) -> None:
    target.load_state_dict(source.state_dict())


def save_llava(folder: Path, tower: LocalTower, answerer: Answerer) -> None:
    """A folder that `AutoModelForImageTextToText` and `AutoProcessor` read."""
    build_llava(tower, answerer).save_pretrained(folder)
    build_processor().save_pretrained(folder)


def write_questions(folder: Path, scenes: Scenes, seed: int) -> Path:
    """Pictures in `folder`, and a LLaVA file there with a record for each question; returns the file.

    The pictures have the pixels that `tower.features` saw with the same seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    questions, picture = ask(scenes), 0
    records: list[dict[str, Any]] = []
    for pixels in rendered(scenes, seed):
        for of_picture in pixels:
            Image.fromarray(of_picture).save(folder / f"{picture:06d}.png")
            for number, kind in enumerate(questions.kind_R):
                asked = " ".join(WORDS[word] for word in questions.asked_BR3[picture, number])
                turns = [("human", f"<image>\n{asked}"), ("gpt", WORDS[questions.answer_BR[picture, number]])]
                records.append(
                    {
                        "id": f"{picture:06d}-{number:02d}-{kind}",
                        "image": f"{picture:06d}.png",
                        "conversations": [{"from": role, "value": text} for role, text in turns],
                    }
                )
            picture += 1
    file = folder / "questions.json"
    file.write_text(json.dumps(records))
    return file
