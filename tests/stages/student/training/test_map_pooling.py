"""The attention loss on maps of cells: as the dense definition in float64, of values and gradients."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from stages.attention.capture import AttentionCapture, enable_capture
from stages.checkpoints.processors import load_processor
from stages.student.data.batch import Batch
from stages.student.data.batch_transport import flatten
from stages.student.data.collator import Collator
from stages.student.data.sample_reader import SampleReader
from stages.student.layer_matching import MatchingConfig, match_layers
from stages.student.losses.attention import matched_loss
from stages.student.model.build import build_student
from stages.student.model.student import Student
from stages.student.stage_config import AttentionLoss
from stages.student.training.forward import run_student
from storage.codecs.attention_maps import MapCodec
from storage.streaming.stream import StreamConfig
from storage.targets.store import TargetStore
from tests.checkpoints import make_llava_data, make_tiny_llava, make_tiny_lm
from tests.stages.distilled import TinyData, extract_here
from tests.storage.builders import target_stream


@dataclass(frozen=True)
class World:
    """A store of maps of 3x3 cells of 5x5 tokens, a batch of it in float64, and a student."""

    store: TargetStore
    batch: Batch
    student: Student


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    from stages.samples.pack import PackConfig, pack_samples

    folder = tmp_path_factory.mktemp("cells")
    teacher = make_tiny_llava(folder / "teacher", num_layers=8, image_size=40)
    lm = make_tiny_lm(folder / "lm", tokenizer_from=teacher, num_layers=6)
    pack_samples(*make_llava_data(folder / "data", 10), folder / "samples", PackConfig())
    data = TinyData(teacher, lm, folder / "samples")
    store = extract_here(data, folder / "targets", map_codec="float16", map_pooling=2, answer_attention=True)
    config = StreamConfig(seed=0, shuffle_shards=0, batch_size=8)
    stream = target_stream(data.samples, store, config, rank=0, world_size=1, epoch=0, with_answers=True)
    processor = load_processor(store.teacher_folder())
    batch = Collator(SampleReader(processor, processor.image_token_id, 10_000))(next(iter(stream)))
    assert 0 < batch.num_with_image < len(batch.keys)
    student = build_student(store.teacher_folder(), Path(lm), seed=0).double()
    enable_capture(student)
    return World(store, flatten(batch).restore().to(torch.device("cpu"), torch.float64), student)


def teacher_maps(world: World, row: int) -> Tensor:
    """`[L, N, N]` float64 of the captured layers."""
    made = world.store.manifest.fingerprint
    stored = world.batch.maps[row]
    assert stored is not None
    return MapCodec.of_layers(made.map_codec, made.layers, made.windows).decode(stored).double()


def dense_loss(own: Tensor, wanted: Tensor, kind: AttentionLoss) -> Tensor:
    """Of one pair of maps of cells, written out; sinks of both are left out, and what the teacher has as 0."""
    kept = wanted > 0
    for one in (own.detach(), wanted):
        kept = kept & (one <= one.mean() + one.std())

    def divergence(a: Tensor, b: Tensor) -> Tensor:
        a, b = a / a.sum(), b / b.sum()
        at = b > 0
        return (b[at] * (b[at] / a[at]).log()).sum()

    if kind == "row_kl":
        rows = [i for i in range(len(own)) if int(kept[i].sum()) > 1]
        return torch.stack([divergence(own[i] * kept[i], wanted[i] * kept[i]) for i in rows]).mean()
    a, b = ((one * kept).sum(0) / kept.sum(0).clamp(min=1) for one in (own, wanted))
    if kind == "cosine":
        return 1 - a @ b / (a.norm() * b.norm())
    return (a - b).square().mean() if kind == "mse" else divergence(a, b)


@pytest.mark.parametrize("kind", get_args(AttentionLoss))
@pytest.mark.parametrize("matching_kind", ["group", "one_to_one"])
def test_loss_and_gradient_are_those_of_dense_maps_pooled_in_float64(
    world: World, kind: AttentionLoss, matching_kind: str
) -> None:
    matched = MatchingConfig.model_validate({"num_matched": 2, "kind": matching_kind})
    matching = match_layers(6, world.store.manifest, matched)[0]
    weight = world.student.model.language_model.layers[0].self_attn.q_proj.weight
    output = run_student(world.student, world.batch, matching)
    windows = output.windows
    assert windows is not None
    pairs = zip(output.maps, windows.maps_WBNN, windows.keep_WBNN, strict=True)
    found = torch.stack([matched_loss(*maps, windows.num_tokens_B, kind=kind).sum() for maps in pairs]).sum()

    capture = AttentionCapture(frozenset(matching.student_layers), world.batch.image_positions)
    world.student.model(**world.batch.inputs, capture=capture, use_cache=False)
    losses = []
    for row, positions in enumerate(world.batch.image_positions):
        assert world.batch.cells is not None
        cells_X = world.batch.cells[row]
        if cells_X is None:
            assert not len(positions)
            continue
        members_XN = torch.nn.functional.one_hot(cells_X.long()).double()
        assert set(members_XN.sum(0).tolist()) == {4.0, 2.0, 1.0}
        of_layers = teacher_maps(world, row)
        for layer, window in zip(matching.student_layers, matching.windows, strict=True):
            own_XX = capture.maps[layer][row, : len(positions), : len(positions)]
            own = members_XN.T @ own_XX @ members_XN / members_XN.sum(0)[:, None]
            wanted = of_layers[[matching.captured_layers.index(one) for one in window]].mean(0)
            losses.append(dense_loss(own, wanted, kind))
    expected = torch.stack(losses).sum()
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)
    ours, theirs = (torch.autograd.grad(one, weight, retain_graph=True)[0] for one in (found, expected))
    assert float(torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)) > 0.9999
    torch.testing.assert_close(ours.norm(), theirs.norm(), rtol=5e-3, atol=0)


def test_a_students_answers_look_at_cells_as_the_teachers_do(world: World) -> None:
    matching = match_layers(6, world.store.manifest, MatchingConfig(num_matched=2))[0]
    plain = run_student(world.student, world.batch, matching)
    assert plain.answers
    for own_WaN, wanted_WaN in plain.answers:
        assert own_WaN.shape == wanted_WaN.shape
        assert own_WaN.shape[-1] == 9


def test_without_a_sink_mask_every_pair_that_a_query_sees_takes_part(world: World) -> None:
    matching = match_layers(6, world.store.manifest, MatchingConfig(num_matched=2))[0]
    windows = run_student(world.student, world.batch, matching, sink_mask=False).windows
    assert windows is not None
    row = next(row for row, maps in enumerate(world.batch.maps) if maps is not None)
    # Two rows of cells see all of their own row, too; the last is one row of tokens, which see those before them.
    assert windows.keep_WBNN[0, row].sum(1).tolist() == [3, 3, 3, 6, 6, 6, 7, 8, 9]
