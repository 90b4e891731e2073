"""LoRA reaches every linear layer of the decoder's layers, whatever its name, and none elsewhere."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from stages.attention.capture import AttentionCapture, enable_capture
from stages.student.model.build import build_student
from stages.student.model.student import Student
from stages.student.model.trainable import prepare_for_stage
from stages.student.stage_config import DistilledFinetuning, LoraSettings
from stages.teacher.config import TeacherConfig
from stages.teacher.teacher import load_teacher
from tests.checkpoints import make_tiny_llava, make_tiny_lm
from tests.tiny_families import make_tiny_family
from tests.tiny_recipes import OLDER

SIZES = {"vocab_size": 340, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.25}
IDS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": 0}
NAMED_SO = r".*(language_model|text_model)\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""Where LoRA was put by name: in Llama and its kin that is every linear layer."""
LORA = LoraSettings(rank=4, alpha=8)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a target store keeps of a teacher."""
    folder = tmp_path_factory.mktemp("teacher")
    checkpoint = make_tiny_llava(folder / "checkpoint")
    (folder / "teacher").mkdir()
    load_teacher(TeacherConfig(checkpoint=str(checkpoint))).save_vision(folder / "teacher")
    return folder / "teacher"


def student_on(teacher: Path, folder: Path, make: Callable[[], PreTrainedModel]) -> Student:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        make().save_pretrained(folder)
    return build_student(teacher, folder, seed=0)


def adapted(student: Student) -> list[str]:
    """Names of the layers that have an update, in the model's order."""
    prepare_for_stage(student, DistilledFinetuning(), LORA, seed=5)
    return [name.removesuffix(".lora_A") for name, _ in student.named_modules() if name.endswith(".lora_A")]


def of_each_layer(num_layers: int, *names: str, decoder: str = "model.language_model") -> list[str]:
    return [f"{decoder}.layers.{layer}.{name}" for layer in range(num_layers) for name in names]


def test_fused_projections_learn_too_also_from_the_attention_loss(teacher: Path, tmp_path: Path) -> None:
    student = student_on(teacher, tmp_path / "phi3", lambda: Phi3ForCausalLM(Phi3Config(**SIZES, **IDS)))
    names = ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert adapted(student) == of_each_layer(3, *names)
    enable_capture(student)
    ids_T = torch.tensor([5, *[student.config.image_token_id] * 16, 6])
    capture = AttentionCapture(frozenset({2}), [(ids_T == student.config.image_token_id).nonzero()[:, 0]])
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, 32, 32, generator=generator)
    student.model(input_ids=ids_T[None], pixel_values=pixels, capture=capture, use_cache=False)
    capture.maps[2].square().sum().backward()
    gradient = student.get_parameter("model.language_model.layers.2.self_attn.qkv_proj.lora_B.default.weight").grad
    queries_dR, keys_dR = gradient[:24], gradient[24:36]
    assert float(queries_dR.abs().max()) > 1e-6
    assert float(keys_dR.abs().max()) > 1e-6


def test_llama_and_qwen2_have_updates_at_the_layers_they_always_had(teacher: Path, tmp_path: Path) -> None:
    make_tiny_lm(tmp_path / "qwen2", tokenizer_from=teacher, num_layers=3)
    students = [
        student_on(teacher, tmp_path / "llama", lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **IDS))),
        build_student(teacher, tmp_path / "qwen2", seed=0),
    ]
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    expected = of_each_layer(3, *attention, *(f"mlp.{name}_proj" for name in ("gate", "up", "down")))
    assert [adapted(student) for student in students] == [expected, expected]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("case", ["qwen2", *sorted(OLDER)])
def test_updates_begin_as_they_did_when_layers_were_found_by_name(case: str, teacher: Path, tmp_path: Path) -> None:
    """So that a run begun before goes on, and one begun again has the same bytes."""

    def load() -> Student:
        if case == "qwen2":
            return build_student(teacher, folder, seed=0)
        return AutoModelForImageTextToText.from_pretrained(folder)

    folder = tmp_path / "m"
    if case == "qwen2":
        make_tiny_lm(folder, tokenizer_from=teacher)
    else:
        make_tiny_family(folder, case)
    found = load()
    prepare_for_stage(found, DistilledFinetuning(), LORA, seed=5)
    by_name = load()
    by_name.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        get_peft_model(by_name, LoraConfig(r=4, lora_alpha=8, target_modules=NAMED_SO, bias="none"))
    expected = updates(by_name)
    assert len(expected) == 2 * 7 * 4
    assert list(updates(found)) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in updates(found).items())


def updates(student: Student) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in student.named_parameters() if "lora_" in name}


def test_experts_kept_as_one_tensor_stay_frozen_and_a_warning_says_so(
    teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    shared = {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 1}
    config = Qwen2MoeConfig(**SIZES, **IDS, **experts, **shared)
    student = student_on(teacher, tmp_path / "moe", lambda: Qwen2MoeForCausalLM(config))
    assert "model.language_model.layers.0.mlp.shared_expert.up_proj" in adapted(student)
    (record,) = (record for record in caplog.records if record.name == "stages.student.model.trainable")
    message = record.getMessage()
    # Of each layer two tensors of experts, and the router's.
    assert re.search(r"9 matrices of the decoder's layers \(\d\d % of their parameters\), such as .*mlp\.", message)
    assert "They learn in a stage with trains: full" in message
    frozen = student.get_parameter("model.language_model.layers.0.mlp.experts.down_proj")
    assert not frozen.requires_grad
    caplog.clear()
    adapted(student_on(teacher, tmp_path / "llama", lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **IDS))))
    assert not caplog.records
