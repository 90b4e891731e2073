"""A batch through the student: what is left out of its inputs changes nothing that is read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stages.attention.capture import AttentionCapture, enable_capture
from stages.checkpoints.processors import load_processor
from stages.student.data.batch import Batch
from stages.student.data.collator import Collator
from stages.student.data.sample_reader import SampleReader
from stages.student.layer_matching import LayerMatching, MatchingConfig, match_layers
from stages.student.model.build import build_student
from stages.student.model.loading import load_student
from stages.student.model.student import Student
from stages.student.training.forward import run_student
from storage.streaming.stream import StreamConfig
from storage.targets.store import TargetStore
from tests.conftest import TinyWorld
from tests.storage.builders import target_stream

NUM_SAMPLES = 8


@pytest.fixture(scope="module")
def store(targets: Path) -> TargetStore:
    return TargetStore.open(targets)


@pytest.fixture(scope="module")
def batch(tiny: TinyWorld, store: TargetStore) -> Batch:
    """Samples of several lengths, with and without images, in float64."""
    config = StreamConfig(seed=0, shuffle_shards=0, batch_size=NUM_SAMPLES)
    samples = next(iter(target_stream(tiny.samples, store, config, rank=0, world_size=1, epoch=0)))
    processor = load_processor(store.teacher_folder())
    batch = Collator(SampleReader(processor, processor.image_token_id, 10_000))(samples)
    lengths = batch.inputs["attention_mask"].sum(1)
    assert lengths.min() < lengths.max()
    return batch.to(torch.device("cpu"), torch.float64)


def matching_of(student: Student, store: TargetStore) -> LayerMatching:
    return match_layers(len(student.model.language_model.layers), store.manifest, MatchingConfig())[0]


def names_given_to(decoder: nn.Module) -> list[set[str]]:
    """Filled when the decoder runs: the inputs that it is called with."""
    found: list[set[str]] = []

    def note(_: nn.Module, __: Any, given: dict[str, Any]) -> None:
        found.append({name for name, value in given.items() if value is not None})

    decoder.register_forward_pre_hook(note, with_kwargs=True)
    return found


def test_without_a_mask_of_the_padding_hidden_states_maps_and_gradients_are_the_same(
    tiny: TinyWorld, store: TargetStore, batch: Batch
) -> None:
    student = build_student(store.teacher_folder(), tiny.student_lm, seed=0).double()
    enable_capture(student)
    matching = matching_of(student, store)
    real_BT = batch.inputs["attention_mask"].bool()
    given = names_given_to(student.model.language_model)

    output = run_student(student, batch, matching)
    hidden_BTd, maps = output.hidden_BTd, output.maps
    assert "attention_mask" not in given[0]
    found = [hidden_BTd[real_BT], *maps]

    capture = AttentionCapture(frozenset(matching.student_layers), batch.image_positions)
    masked_BTd = student.model(**batch.inputs, capture=capture, use_cache=False).last_hidden_state
    assert "attention_mask" in given[1]
    expected = [masked_BTd[real_BT], *(capture.maps[layer] for layer in matching.student_layers)]

    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = student.model.language_model.layers[0].self_attn.q_proj.weight
    gradients = [
        torch.autograd.grad(sum(part.square().sum() for part in side), weight)[0] for side in (found, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    assert float(gradients[0].norm()) > 0


def test_a_student_with_its_own_vision_tower_is_told_where_the_padding_is(
    tiny: TinyWorld, store: TargetStore, batch: Batch
) -> None:
    student = load_student(tiny.teacher).double()
    enable_capture(student)
    given = names_given_to(student.model.language_model)
    run_student(student, batch, matching_of(student, store))
    assert "attention_mask" in given[0]
