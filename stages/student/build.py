"""Building a student: the teacher's frozen eyes from the target store, its own decoder, a new post-connector (TAF)."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, ProcessorMixin

from stages.checkpoints import resolve_checkpoint
from stages.families import family_of
from stages.student.modeling_compodistill import (
    CompoDistillStudentConfig,
    CompoDistillStudentForConditionalGeneration,
    register,
)
from storage.errors import UserError

Student = CompoDistillStudentForConditionalGeneration


def build_student(teacher_folder: Path, decoder: str | Path, seed: int, dtype: torch.dtype = torch.float32) -> Student:
    """A new student on a pretrained decoder.

    Args:
        teacher_folder: `teacher/` of a target store: vision tower, adapter, configs, processor.
        decoder: folder or hub id of a causal language model.
        seed: of the post-connector's initial weights.
        dtype: of the parameters.

    Raises:
        UserError: the decoder's tokenizer gives other ids than the teacher's.
    """
    decoder_folder = resolve_checkpoint(decoder)
    check_same_tokens(load_processor(teacher_folder), decoder_folder)
    teacher_config = AutoConfig.from_pretrained(teacher_folder)
    language_model = AutoModelForCausalLM.from_pretrained(decoder_folder, dtype=dtype)
    config = student_config(teacher_config.to_dict(), language_model.config.to_dict())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student: Student = Student(config).to(dtype)
    student.model.language_model.load_state_dict(language_model.model.state_dict())
    student.lm_head.load_state_dict(language_model.lm_head.state_dict())
    student.tie_weights()
    prefixes = family_of(teacher_config.model_type).vision_prefixes
    seen = load_file(teacher_folder / "model.safetensors")
    _, unexpected = student.load_state_dict(seen, strict=False)
    missing = [name for name in student.state_dict() if name.startswith(prefixes) and name not in seen]
    if unexpected or missing:
        raise UserError(
            f"{teacher_folder} does not fit this student: unexpected {unexpected[:3]}, missing {missing[:3]}; "
            "the target store's teacher/ folder is incomplete or of another version"
        )
    return student


def load_student(folder: Path, dtype: torch.dtype = torch.float32) -> Student:
    """A student saved by an earlier stage."""
    register()
    student: Student = Student.from_pretrained(folder, dtype=dtype)
    return student


def is_student(folder: Path) -> bool:
    """Whether a checkpoint is a student of this project rather than a bare decoder."""
    config = json.loads((folder / "config.json").read_text())
    return bool(config.get("model_type") == CompoDistillStudentConfig.model_type)


def load_processor(teacher_folder: Path) -> ProcessorMixin:
    """The teacher's processor: the student reads images and text as the teacher did."""
    processor: ProcessorMixin = AutoProcessor.from_pretrained(teacher_folder)
    return processor


def student_config(teacher: dict[str, object], text: dict[str, object]) -> CompoDistillStudentConfig:
    """The teacher's image side, the decoder's text side."""
    text_config = AutoConfig.for_model(**text)
    shared = (
        "image_token_index",
        "image_seq_length",
        "projector_hidden_act",
        "vision_feature_select_strategy",
        "vision_feature_layer",
        "multimodal_projector_bias",
    )
    teacher_text = teacher["text_config"]
    assert isinstance(teacher_text, dict)
    return CompoDistillStudentConfig(
        vision_config=teacher["vision_config"],
        text_config=text_config,
        adapter_hidden_size=teacher_text["hidden_size"],
        tie_word_embeddings=text_config.tie_word_embeddings,
        **{name: teacher[name] for name in shared if name in teacher},
    )


def check_same_tokens(processor: ProcessorMixin, decoder_folder: Path) -> None:
    """Refuses a decoder whose tokenizer gives another id to a token of the teacher's.

    Tokens that only one side has (such as the image placeholder) are fine: the stream's ids are checked against
    the decoder's vocabulary when they are used.
    """
    if not (decoder_folder / "tokenizer.json").is_file():
        return
    teacher_ids = processor.tokenizer.get_vocab()
    student_ids = AutoTokenizer.from_pretrained(decoder_folder).get_vocab()
    differing = [t for t, number in student_ids.items() if t in teacher_ids and teacher_ids[t] != number]
    shared = sum(token in teacher_ids for token in student_ids)
    if differing or shared < 0.9 * min(len(teacher_ids), len(student_ids)):
        example = f", for example {differing[0]!r}" if differing else ""
        raise UserError(
            f"the tokenizer of {decoder_folder} is not the teacher's: of {len(student_ids)} tokens {shared} are shared "
            f"and {len(differing)} of those have another id{example}; choose a student of the teacher's family"
        )
