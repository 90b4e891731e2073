"""How many GPUs a teacher needs: what is counted of it, and what large teachers come to."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import compute_module_sizes, get_balanced_memory, infer_auto_device_map

from stages.estimate.analytic import estimate_from_configs
from stages.estimate.memory import CODED_LAYERS, CODED_WINDOWS, FLOAT, LOGIT_BYTES, empty_model, teacher_memory
from stages.estimate.report import EstimateConfig, TeacherMemory
from stages.teacher.batching import PreparedSample, SamplePreparer
from stages.teacher.config import TeacherConfig
from stages.teacher.identity import identify_teacher
from stages.teacher.placement import MEMORY_FOR_WEIGHTS
from stages.teacher.prefix_forward import run_prefixes
from stages.teacher.teacher import load_teacher
from stages.teacher.timings import Timings
from storage.errors import UserError
from storage.samples.sample_set import SampleSet
from tests.checkpoints import make_tiny_llava
from tests.processes import PATIENCE_S
from tests.stages.distilled import TinyData, make_tiny_data
from tests.tiny_families import make_tiny_family

ONE_IMAGE = {"image_tokens": 576.0, "maps": 1.0}
LARGE = {
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 80,
    "layer_types": None,
    "vocab_size": 152064,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_tiny_data(tmp_path_factory.mktemp("memory"), num_samples=8)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a decoder of 72 billion weights, without any."""
    folder = make_tiny_llava(tmp_path_factory.mktemp("large") / "teacher")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= LARGE
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    return folder


def memory_of(checkpoint: Path, gpu_memory_gb: float = 80.0, **settings: object) -> TeacherMemory:
    asked = TeacherConfig.model_validate({"checkpoint": str(checkpoint), **settings})
    identity = identify_teacher(asked, on_gpu=True, with_weights=False)
    return teacher_memory(identity, empty_model(identity), ONE_IMAGE, EstimateConfig(gpu_memory_gb=gpu_memory_gb))


def test_weights_and_caches_are_those_of_the_loaded_teacher(data: TinyData) -> None:
    settings = TeacherConfig(checkpoint=str(data.teacher), dtype="float32", prefix_reuse="on", batch_size=1)
    teacher = load_teacher(settings)
    with SampleSet.open(data.samples).shard(0) as shard:
        sample = SamplePreparer(teacher.encoder, shard, Timings())(0)
    assert isinstance(sample, PreparedSample)
    prefixes = run_prefixes(teacher, [sample], [sample])
    kept = sum(part.nbytes for states in prefixes.record.states.values() for part in states)
    found = memory_of(data.teacher, dtype="float32", prefix_reuse="on", batch_size=1, max_length=sample.padded_prefix)
    assert found.weight_bytes == sum(weight.nbytes for weight in teacher.model.parameters())
    assert found.cache_bytes == kept
    assert found.gpus == 1
    assert memory_of(data.teacher, prefix_reuse="off").cache_bytes == 0
    assert 2 * memory_of(data.teacher, dtype="bfloat16").weight_bytes == found.weight_bytes


def test_a_teacher_of_72_billion_weights_needs_three_gpus_of_80_gb_two_of_141_and_one_of_288(large: Path) -> None:
    found = {size: memory_of(large, size) for size in (80.0, 141.0, 288.0)}
    assert [each.gpus for each in found.values()] == [3, 2, 1]
    assert found[80.0].weight_bytes == pytest.approx(145e9, rel=0.02)
    for size, each in found.items():
        assert each.bytes_of_weights_per_gpu < each.bytes_per_gpu <= each.gpu_bytes == size * 1e9
    assert [each.batches_in_flight for each in found.values()] == [4, 3, 1]
    fixed = memory_of(large, batch_size=found[80.0].batch_size * 2)
    assert fixed.gpus is not None
    assert fixed.gpus > 3 or fixed.batches_in_flight < 4, "the batch found is the largest that fits in flight"


@pytest.mark.slow
@pytest.mark.parametrize(("gpus", "size"), [(2, 141e9), (3, 80e9)])
def test_the_librarys_balance_puts_no_more_weights_on_a_gpu_than_counted(large: Path, gpus: int, size: float) -> None:
    identity = identify_teacher(TeacherConfig(checkpoint=str(large)), on_gpu=True, with_weights=False)
    model = empty_model(identity).to(torch.bfloat16)
    room = {gpu: round(MEMORY_FOR_WEIGHTS * size) for gpu in range(gpus)}
    whole = list(model._no_split_modules)
    room = get_balanced_memory(model, max_memory=room, no_split_module_classes=whole)
    parts = infer_auto_device_map(model, max_memory=room, no_split_module_classes=whole)
    sizes, held = compute_module_sizes(model), Counter[int]()
    for name, gpu in parts.items():
        held[gpu] += sizes[name]
    assert set(held) == set(range(gpus))
    counted = memory_of(large, size / 1e9)
    assert counted.gpus == gpus
    assert 0.9 * counted.bytes_of_weights_per_gpu < max(held.values()) <= counted.bytes_of_weights_per_gpu


def test_a_teacher_too_large_for_a_gpu_a_layer_is_said_to_be(large: Path) -> None:
    assert memory_of(large, 3.0).gpus is None
    settings = TeacherConfig(checkpoint=str(large))
    made = estimate_from_configs(settings, None, EstimateConfig(samples=10, gpu_memory_gb=3.0), workers=1)
    assert any("the most GPUs that can share the teacher do not hold it" in note for note in made.notes)
    for gpus, is_said in ((1, True), (2, True), (3, False)):
        made = estimate_from_configs(settings, None, EstimateConfig(samples=10), workers=1, gpus_per_worker=gpus)
        assert ("the teacher needs 3 GPUs: set extract.gpus_per_worker=3" in made.notes) == is_said
        assert made.gpus_per_worker == gpus


def test_split_layers_share_the_weights_among_a_number_of_gpus_that_divides_their_heads(large: Path) -> None:
    found = memory_of(large, parallel="tensor")
    assert found.gpus == 4, "3 would hold it, and do not divide 8 heads of keys and values"
    assert found.bytes_of_weights_per_gpu == pytest.approx(found.weight_bytes / 4, rel=0.02)
    assert found.bytes_per_gpu <= 80e9
    assert memory_of(large, 3.0, parallel="tensor").gpus is None
    settings = TeacherConfig(checkpoint=str(large), parallel="tensor")
    made = estimate_from_configs(settings, None, EstimateConfig(samples=10), workers=1)
    assert "the teacher needs 4 GPUs: set extract.gpus_per_worker=4" in made.notes
    assert any("what several gain was not measured" in note for note in made.notes)
    with pytest.raises(UserError, match="do not divide by 3"):
        estimate_from_configs(settings, None, EstimateConfig(samples=10), workers=1, gpus_per_worker=3)


def test_a_teacher_that_cannot_be_split_is_refused_by_the_estimate_too(tmp_path: Path) -> None:
    settings = TeacherConfig(checkpoint=str(make_tiny_family(tmp_path / "experts", "glm4v_moe")), parallel="tensor")
    with pytest.raises(UserError, match="its decoder is of type glm4v_moe_text"):
        estimate_from_configs(settings, None, EstimateConfig(samples=10), workers=1)


def test_packed_weights_count_by_their_bits_and_those_that_are_unpacked_as_floats(large: Path) -> None:
    identity = identify_teacher(TeacherConfig(checkpoint=str(large)), on_gpu=True, with_weights=False)
    model, found = empty_model(identity), {}
    for scheme in ({}, {"quant_method": "fp8"}, {"quant_method": "gptq", "bits": 4}, {"load_in_8bit": True}):
        identity.config.quantization_config = scheme
        found[str(scheme)] = teacher_memory(identity, model, ONE_IMAGE, EstimateConfig()).weight_bytes
    dense, unpacked, four, eight = found.values()
    assert unpacked == dense
    in_layers = sum(weight.numel() for weight in model.get_decoder().layers.parameters() if weight.dim() > 1)
    assert (dense - four, dense - eight) == (1.5 * in_layers, in_layers)


@pytest.fixture(scope="module")
def coding() -> dict[str, Any]:
    run = [sys.executable, "-m", "tests.stages.estimate.coding_memory"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(run, capture_output=True, text=True, timeout=PATIENCE_S, env=environment, check=True)
    answer: dict[str, Any] = json.loads(found.stdout)
    return answer


def test_coding_holds_about_as_much_as_is_counted_for_it(coding: dict[str, Any]) -> None:
    for num_layers, num_tokens, causal, num_bytes in coding["maps"]:
        maps = num_layers * CODED_LAYERS[causal] + coding["windows"] * CODED_WINDOWS[causal]
        assert 0.9 < num_bytes / (maps * num_tokens**2 * FLOAT) < 1.1
    assert coding["answers"] == pytest.approx(LOGIT_BYTES, rel=0.05)
