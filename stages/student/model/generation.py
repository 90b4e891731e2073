"""What generation needs: a row for every token id, the tokens that end an answer, padding on the left."""

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from torch.nn.functional import pad
from transformers import GenerationConfig, PreTrainedModel

from stages.conversations.encoder import EncodedConversation
from stages.student.model.projector_folding import ModelParts

_VIDEO_HALVES: Final = {
    "glm4v": "Glm4vVideoProcessor",
    "glm4v_moe": "Glm4vVideoProcessor",
    "internvl": "InternVLVideoProcessor",
    "llava_onevision": "LlavaOnevisionVideoProcessor",
    "qwen2_vl": "Qwen2VLVideoProcessor",
    "qwen2_5_vl": "Qwen2VLVideoProcessor",
    "qwen3_5": "Qwen3VLVideoProcessor",
    "qwen3_5_moe": "Qwen3VLVideoProcessor",
    "qwen3_vl": "Qwen3VLVideoProcessor",
    "qwen3_vl_moe": "Qwen3VLVideoProcessor",
    "smolvlm": "SmolVLMVideoProcessor",
}


def vocabulary_tables(model: PreTrainedModel) -> list[str]:
    """Names of the parameters with a row for each token id: the embedding, and the head."""
    tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    return [name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in tables]


def grow_vocabulary(parts: ModelParts, tables: Sequence[str], tokenizer: Any) -> tuple[ModelParts, list[int]]:
    """The same model with a row for every id of the tokenizer, and the ids that got a new row.

    The teacher's image token and padding token may lie past the student's vocabulary. The student's own code never
    looks them up, but transformers does. New rows are zeros, so that the other logits stay.
    """
    rows = int(parts.tensors[tables[0]].shape[0])
    added_ids = list(range(rows, max(tokenizer.get_vocab().values()) + 1))
    if not added_ids:
        return parts, []
    tensors, config = dict(parts.tensors), copy.deepcopy(parts.config)
    for name in tables:
        tensors[name] = pad(tensors[name], (0, 0, 0, len(added_ids)))
    config.get_text_config().vocab_size = rows + len(added_ids)
    return replace(parts, config=config, tensors=tensors), added_ids


def generation_settings(
    student: PreTrainedModel, tokenizer: Any, answered: EncodedConversation, added_ids: Sequence[int]
) -> GenerationConfig:
    """The student's settings with the tokens that end an answer; image tokens and `added_ids` are never generated.

    `student` is as it was trained, not the grown one; `tokenizer` has the padding token of batches, see
    `pad_on_the_left`. The `answer_mask` of `answered` includes the token that ends the answer, if there is one.
    """
    settings = copy.deepcopy(student.generation_config)
    # Otherwise loading would make them from the model's config again.
    settings._from_model_config = False
    named = (settings.eos_token_id, student.config.get_text_config().eos_token_id, tokenizer.eos_token_id)
    ends = {token for ids in named for token in (ids if isinstance(ids, list) else [ids]) if token is not None}
    last = int(answered.token_ids[answered.answer_mask][-1])
    if last in tokenizer.added_tokens_decoder:
        ends.add(last)
    settings.eos_token_id = sorted(ends)
    settings.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    settings.suppress_tokens = sorted({student.config.image_token_id, *added_ids} - ends)
    return settings


def pad_on_the_left(tokenizer: Any) -> None:
    """Pads prompts on the left, so that a batch's answers begin at one position; adds a padding token if needed."""
    tokenizer.padding_side = "left"
    # A tokenizer saves only the settings that it was made with.
    tokenizer.init_kwargs["padding_side"] = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def name_video_half(model_type: str, folder: Path) -> None:
    """Writes which class reads videos, for families whose processors have such a half.

    This project leaves it out: it needs torchvision. transformers insists on it when it loads such a processor.
    """
    if name := _VIDEO_HALVES.get(model_type):
        settings = {"video_processor_type": name}
        (folder / "video_preprocessor_config.json").write_text(json.dumps(settings, indent=1))
