"""A checkpoint is loaded with all its weights, or refused with what it lacks."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from stages.checkpoints.resolve import resolve_checkpoint
from stages.checkpoints.weights import load_weights
from stages.student.model.loading import load_multimodal
from stages.teacher.config import TeacherConfig
from stages.teacher.teacher import load_teacher
from storage.errors import UserError
from tests.checkpoints import make_tiny_llava

NAME = "model.layers.1.mlp.down_proj.weight"
FILE = "model.safetensors"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return saved(tmp_path / "llama")


def saved(folder: Path, *, tied: bool = False, shard: str = "1GB") -> Path:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=shard)
    return folder


def change(folder: Path, **tensors: torch.Tensor | None) -> Path:
    """Writes these tensors into the weight file, None takes one out."""
    held: dict[str, torch.Tensor | None] = {**load_file(folder / FILE)}
    assert all(name in held for name, tensor in tensors.items() if tensor is None)
    held |= tensors
    save_file({name: t for name, t in held.items() if t is not None}, folder / FILE, metadata={"format": "pt"})
    return folder


def refusal(folder: Path, *, nothing_else: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        load_weights(AutoModelForCausalLM, folder, nothing_else=nothing_else)
    return str(caught.value)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_whole_checkpoint_is_loaded(llama: Path, device: str) -> None:
    assert load_weights(AutoModelForCausalLM, llama, device_map=device).device.type == device


def test_a_missing_tensor_is_refused_by_its_name(llama: Path) -> None:
    found = refusal(change(llama, **{NAME: None}))
    assert f"missing: {NAME}" in found
    assert "Fetch the checkpoint again" in found


def test_a_missing_tensor_is_refused_from_headers_alone(llama: Path) -> None:
    with pytest.raises(UserError, match=f"missing: {NAME}"):
        load_weights(AutoModelForCausalLM, change(llama, **{NAME: None}), device_map="meta")


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(llama: Path) -> None:
    assert f"of another shape: {NAME} [32, 47] for [32, 48]" in refusal(change(llama, **{NAME: torch.zeros(32, 47)}))


def test_tensors_that_no_class_reads_are_refused_where_nothing_else_may_be_there(llama: Path) -> None:
    change(llama, **{"model.more": torch.zeros(2)})
    load_weights(AutoModelForCausalLM, llama)
    assert "unexpected: model.more" in refusal(llama, nothing_else=True)


def test_tied_weights_that_are_stored_once_are_not_missed_but_untied_ones_are(tmp_path: Path) -> None:
    tied = saved(tmp_path / "tied", tied=True)
    assert "lm_head.weight" not in load_file(tied / FILE)
    load_weights(AutoModelForCausalLM, tied)
    assert "missing: lm_head.weight" in refusal(change(saved(tmp_path / "own"), **{"lm_head.weight": None}))


@pytest.mark.parametrize("num_bytes", [0, 5, 5000, -1])
@pytest.mark.parametrize("use", [resolve_checkpoint, lambda folder: load_weights(AutoModelForCausalLM, folder)])
def test_a_file_that_is_cut_short_is_refused_by_its_name(
    llama: Path, num_bytes: int, use: Callable[[Path], object]
) -> None:
    (llama / FILE).write_bytes((llama / FILE).read_bytes()[:num_bytes])
    with pytest.raises(UserError, match="is not whole") as caught:
        use(llama)
    assert str(caught.value).startswith(f"{llama / FILE} (")


def test_a_shard_that_the_index_names_but_the_folder_lacks_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "sharded", shard="20KB")
    first, *_ = sorted(folder.glob("*.safetensors"))
    load_weights(AutoModelForCausalLM, folder)
    first.unlink()
    assert f"names {first.name}, which the folder does not hold" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps([]))
    assert "has no weight_map" in refusal(folder)


def test_teachers_and_multimodal_checkpoints_that_lack_weights_are_refused(tmp_path: Path) -> None:
    # Files hold names of an older version of the class.
    folder = change(make_tiny_llava(tmp_path / "llava"), **{"multi_modal_projector.linear_2.weight": None})
    with pytest.raises(UserError, match=r"missing: model\.multi_modal_projector"):
        load_multimodal(folder)
    with pytest.raises(UserError, match=r"missing: model\.multi_modal_projector"):
        load_teacher(TeacherConfig(checkpoint=str(folder)))
