"""Decoders whose layers have linear attention in part: the others are captured and matched among themselves."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from stages.attention.capturable_layers import layers_with_maps
from stages.checkpoints.processors import load_processor
from stages.student.data.sample_reader import resolve_reader_spec
from stages.student.layer_matching import MatchingConfig, match_layers
from stages.student.model.build import build_student
from stages.student.model.modeling_any_teacher import AnyTeacherStudentForConditionalGeneration
from stages.teacher.config import TeacherConfig
from stages.teacher.identity import identify_teacher
from storage.codecs.attention_maps import MapCodec
from storage.errors import UserError
from storage.samples.sample_set import SampleSet
from storage.targets.store import TargetStore
from tests.stages.distilled import TinyData, extract_here
from tests.stages.extracted_families import attentions_by_layer, eager, make_samples, processed
from tests.tiny_families import make_tiny_family

EVERY_OTHER = ["linear_attention", "full_attention"] * 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hybrid")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Path:
    return make_tiny_family(folder / "teacher", "qwen3_5", num_hidden_layers=12, layer_types=EVERY_OTHER)


@pytest.fixture(scope="module")
def store(folder: Path, teacher: Path) -> TargetStore:
    data = TinyData(teacher, teacher, make_samples(folder))
    settings = {"map_codec": "float16", "logit_codec": "float16", "top_k": 1000}
    return extract_here(data, folder / "targets", num_matched=1, **settings)


def test_the_middle_third_is_captured_as_far_as_it_has_maps(teacher: Path) -> None:
    identity = identify_teacher(TeacherConfig(checkpoint=str(teacher)), on_gpu=False)
    assert (identity.layers, identity.windows) == ((5, 7), ((5,), (7,)))


def test_layers_may_be_named_that_are_neighbours_among_those_with_maps(teacher: Path) -> None:
    def named(*layers: int) -> tuple[tuple[int, ...], ...]:
        settings = TeacherConfig(checkpoint=str(teacher), layers=layers, num_matched=1)
        return identify_teacher(settings, on_gpu=False).windows

    assert named(3, 5, 7) == ((3, 5, 7),)
    with pytest.raises(UserError, match=r"layers \[3, 7\] are not consecutive layers of a decoder with 12"):
        named(3, 7)
    with pytest.raises(UserError, match=r"layers \[4, 6\] of .* \(only its layers \[1, 3, 5, 7, 9, 11\] do\)"):
        named(3, 4, 5, 6, 7)
    with pytest.raises(UserError, match=r"layers \[5, 3\] are not consecutive"):
        named(5, 3)


def test_maps_and_their_mean_over_layers_that_lie_apart_are_those_of_eager_attention(
    folder: Path, teacher: Path, store: TargetStore
) -> None:
    made = store.manifest.fingerprint
    assert (made.layers, made.windows) == ((5, 7), ((5, 7),))
    codec = MapCodec.of_layers(made.map_codec, made.layers, made.windows)
    model, processor, num_maps = eager(teacher), load_processor(teacher), 0
    with SampleSet.open(folder / "packed").shard(0) as tar:
        for row in range(5):
            stored, (_, maps) = tar.read(row), store.shard(0).read(row)
            if maps is None:
                continue
            inputs = processed(processor, stored)
            with torch.no_grad():
                found = attentions_by_layer(model, model(**inputs, output_attentions=True).attentions)
            at = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
            expected_LNN = torch.stack([found[layer][0].mean(0)[at][:, at] for layer in made.layers])
            torch.testing.assert_close(codec.decode(maps), expected_LNN, atol=1e-5, rtol=1e-3)
            num_maps += 1
    assert num_maps == 4


def test_students_layers_and_spans_are_chosen_among_those_with_maps(teacher: Path, store: TargetStore) -> None:
    able = layers_with_maps(AutoConfig.from_pretrained(teacher).get_text_config())
    assert able == {1, 3, 5, 7, 9, 11}

    def matched(**settings: object) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        found, _ = match_layers(12, store.manifest, MatchingConfig.model_validate(settings), able=able)
        return found.student_layers, found.windows

    assert matched() == ((5,), ((5, 7),))
    assert matched(num_matched=2) == ((5, 7), ((5,), (7,)))
    assert matched(span="middle", kind="one_to_one", num_matched=2) == ((5, 7), ((5,), (7,)))
    with pytest.raises(UserError, match=r"late layers .* are 9 to 11, .*extract with teacher\.layers=\[9, 11\]"):
        matched(span="late")
    with pytest.raises(UserError, match="at least as many captured teacher layers"):
        matched(num_matched=6)
    with pytest.raises(UserError, match="has 6 layers with attention maps but 7 are to be matched"):
        matched(num_matched=7)


def test_a_whole_checkpoint_gives_its_decoder_to_a_student_of_another_tower(teacher: Path, store: TargetStore) -> None:
    spec = resolve_reader_spec(store, teacher, own_vision=False, kd_weight=1.0)
    assert spec.decoder.model_type == "qwen3_5_text"
    student = build_student(store.teacher_folder(), teacher, seed=0)
    assert isinstance(student, AnyTeacherStudentForConditionalGeneration)
    expected = eager(teacher).model.language_model.state_dict()
    found = student.model.language_model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_a_store_calls_a_window_lies_side_by_side_among_its_layers(store: TargetStore) -> None:
    fields = store.manifest.fingerprint.model_dump()
    for windows in ([[7, 5]], [[5, 6]], [[]]):
        with pytest.raises(ValueError, match="is not of neighbours among the captured layers"):
            type(store.manifest.fingerprint).model_validate({**fields, "windows": windows})
