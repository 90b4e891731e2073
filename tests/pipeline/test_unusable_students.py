"""What cannot be trained to the end is refused before the first stage, and nothing is written."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3NextConfig, Qwen3NextForCausalLM, StableLmConfig, StableLmForCausalLM

from pipeline.attention_comparison import compare_with_targets
from pipeline.export import export
from pipeline.run_file import RunFile
from pipeline.training import train
from stages.student.stage_config import STAGES
from storage.errors import UserError
from tests.conftest import TinyWorld
from tests.pipeline.runs import run_file

WEIGHTS = "model.safetensors"


@pytest.fixture
def decoder(tiny: TinyWorld, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.student_lm, tmp_path / "decoder"))


def with_tokenizer(model: StableLmForCausalLM | Qwen3NextForCausalLM, tiny: TinyWorld, folder: Path) -> Path:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny.student_lm).save_pretrained(folder)
    return folder


def stablelm(tiny: TinyWorld, folder: Path) -> Path:
    config = StableLmConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return with_tokenizer(StableLmForCausalLM(config), tiny, folder)


def run_of(tiny: TinyWorld, targets: Path, decoder: Path, output: Path, *settings: str) -> RunFile:
    return run_file(replace(tiny, student_lm=decoder), targets, output, *settings)


def refusal(tiny: TinyWorld, targets: Path, decoder: Path, output: Path, *settings: str) -> str:
    """All stages are asked for; what is wrong concerns one of them, or all."""
    with pytest.raises(UserError) as caught:
        train(run_of(tiny, targets, decoder, output, *settings), STAGES)
    assert not output.exists()
    return str(caught.value)


def test_a_decoder_whose_layers_do_not_hand_on_what_captures_is_refused(
    tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    found = refusal(tiny, targets, stablelm(tiny, tmp_path / "stablelm"), tmp_path / "run")
    assert "give no attention map (none of its layers does)" in found
    assert "train.matching.student_layers" in found
    assert "attention_weight to 0" in found


def test_a_decoder_that_could_not_be_asked_beforehand_is_refused_at_its_first_batch(
    tiny: TinyWorld, targets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.attention.capturable_layers.layers_with_maps", lambda _: None)
    run = run_of(tiny, targets, stablelm(tiny, tmp_path / "stablelm"), tmp_path / "run")
    with pytest.raises(UserError, match="of the student give no attention map"):
        train(run, ("dft",))


def test_it_can_be_trained_without_the_attention_loss_but_not_be_compared(
    tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    settings = "train.dpt={batch_size: 4, max_steps: 1}", "train.dft={attention_weight: 0, max_steps: 1}"
    train(run_of(tiny, targets, stablelm(tiny, tmp_path / "stablelm"), tmp_path / "run", *settings), ("dpt", "dft"))
    with pytest.raises(UserError, match="give no attention map"):
        compare_with_targets(str(tmp_path / "run"), str(tiny.samples), str(targets), 4)


def test_matched_layers_without_softmax_attention_are_refused_and_others_are_trained(
    tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    config = Qwen3NextConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
    )
    decoder = with_tokenizer(Qwen3NextForCausalLM(config), tiny, tmp_path / "next")
    found = refusal(tiny, targets, decoder, tmp_path / "run", "train.matching.student_layers=[1, 2]")
    assert "layers [2] of " in found
    assert "only its layers [1, 3] do" in found
    settings = "train.matching.student_layers=[1, 3]", "train.dft={batch_size: 4, max_steps: 1, trains: full}"
    (report,) = train(run_of(tiny, targets, decoder, tmp_path / "run", *settings), ("dft",))
    assert report.losses["attention"] > 0


def test_a_decoder_that_lacks_a_tensor_is_refused(
    tiny: TinyWorld, targets: Path, decoder: Path, tmp_path: Path
) -> None:
    held = load_file(decoder / WEIGHTS)
    del held["model.layers.1.mlp.down_proj.weight"]
    save_file(held, decoder / WEIGHTS, metadata={"format": "pt"})
    assert "missing: model.layers.1.mlp.down_proj.weight" in refusal(tiny, targets, decoder, tmp_path / "run")


def test_a_decoder_whose_download_broke_off_is_refused(
    tiny: TinyWorld, targets: Path, decoder: Path, tmp_path: Path
) -> None:
    (decoder / WEIGHTS).write_bytes((decoder / WEIGHTS).read_bytes()[:5000])
    assert str(decoder / WEIGHTS) in refusal(tiny, targets, decoder, tmp_path / "run")


def test_a_decoder_with_a_damaged_tokenizer_is_refused(
    tiny: TinyWorld, targets: Path, decoder: Path, tmp_path: Path
) -> None:
    (decoder / "tokenizer.json").write_text("{")
    assert str(decoder / "tokenizer.json") in refusal(tiny, targets, decoder, tmp_path / "run")


@pytest.mark.parametrize("damage", ["cut", "lacking", "no processor"])
def test_a_damaged_checkpoint_is_not_exported(tiny: TinyWorld, tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(tiny.teacher, tmp_path / "model"))
    if damage == "cut":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5000])
    elif damage == "lacking":
        held = load_file(folder / WEIGHTS)
        held.pop("multi_modal_projector.linear_2.weight")
        save_file(held, folder / WEIGHTS, metadata={"format": "pt"})
    else:
        (folder / "processor_config.json").unlink()
    expected = {"cut": "is not whole", "lacking": "missing: ", "no processor": "no processor"}[damage]
    with pytest.raises(UserError, match=expected):
        export(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
