"""What can be a student's decoder, and what is refused with its reason before training."""

import json
from pathlib import Path

import pytest
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from stages.student.data.sample_reader import resolve_reader_spec
from stages.student.model.build import build_student
from storage.errors import UserError
from storage.targets.store import TargetStore
from tests.conftest import TinyWorld

SIZES = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def saved(model: PreTrainedModel, tiny: TinyWorld, folder: Path) -> Path:
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((tiny.student_lm / "tokenizer.json").read_bytes())
    return folder


def build(folder: Path, targets: Path) -> None:
    store = TargetStore.open(targets)
    resolve_reader_spec(store, folder, own_vision=False, kd_weight=1.0)
    build_student(store.teacher_folder(), folder, seed=0)


def refusal(folder: Path, targets: Path) -> str:
    with pytest.raises(UserError) as caught:
        build(folder, targets)
    return str(caught.value)


def test_llama_is_one(tiny: TinyWorld, targets: Path, tmp_path: Path) -> None:
    build(saved(LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)), tiny, tmp_path / "llama"), targets)


def test_a_model_that_is_no_causal_language_model_is_refused(tiny: TinyWorld, targets: Path, tmp_path: Path) -> None:
    model = T5ForConditionalGeneration(T5Config(vocab_size=512, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))
    assert "is of type t5, which is no causal language model" in refusal(saved(model, tiny, tmp_path / "t5"), targets)


def test_a_decoder_with_its_layers_elsewhere_is_refused(tiny: TinyWorld, targets: Path, tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4))
    found = refusal(saved(model, tiny, tmp_path / "gpt2"), targets)
    assert "is of type gpt2, which cannot be a student's decoder: expected its layers at model.layers" in found


def test_a_decoder_that_scales_its_logits_is_refused(tiny: TinyWorld, targets: Path, tmp_path: Path) -> None:
    model = GraniteForCausalLM(GraniteConfig(**SIZES, **HEADS, logits_scaling=8.0))
    assert "which scales or caps the logits" in refusal(saved(model, tiny, tmp_path / "granite"), targets)


def test_a_decoder_without_sdpa_is_refused(tiny: TinyWorld, targets: Path, tmp_path: Path) -> None:
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, **HEADS))
    found = refusal(saved(model, tiny, tmp_path / "gemma2"), targets)
    assert found.startswith("Gemma2ForCausalLM has no sdpa attention in transformers")


def test_a_config_that_the_library_does_not_know_is_refused(tiny: TinyWorld, targets: Path, tmp_path: Path) -> None:
    folder = saved(LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)), tiny, tmp_path / "new")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama99"}))
    assert "config.json cannot be read by transformers" in refusal(folder, targets)
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    assert "config.json cannot be read by transformers" in refusal(folder, targets)
