"""A flattened batch is the batch, bit for bit, in one allocation."""

import dataclasses

import torch
from torch import Tensor

from stages.conversations.answer_rows import AnswerRows
from stages.student.data.batch import Batch
from stages.student.data.batch_transport import ALIGNMENT, flatten
from storage.codecs.attention_maps import EncodedMaps
from tests.storage.builders import manifest, map_targets


def make_batch() -> Batch:
    maps = map_targets(manifest(), 9, seed=1)
    generator = torch.Generator().manual_seed(0)
    return Batch(
        keys=("a", "b"),
        inputs={
            "input_ids": torch.arange(10).reshape(2, 5),
            "attention_mask": torch.ones(2, 5, dtype=torch.bool),
            "pixel_values": torch.randn(1, 3, 7, 5, generator=generator).transpose(2, 3),
        },
        answers=AnswerRows(torch.tensor([0, 1, 1]), torch.tensor([3, 2, 3]), torch.tensor([7, 8, 9])),
        logits_RQ=torch.randint(0, 255, (3, 11), generator=generator, dtype=torch.uint8),
        image_positions=(torch.arange(3), torch.zeros(0, dtype=torch.long)),
        maps=(maps, None),
    )


def same(left: object, right: object) -> bool:
    if isinstance(left, Tensor):
        assert isinstance(right, Tensor)
        return left.dtype == right.dtype and left.shape == right.shape and bool((left == right).all())
    if dataclasses.is_dataclass(left):
        return type(left) is type(right) and all(
            same(getattr(left, field.name), getattr(right, field.name)) for field in dataclasses.fields(left)
        )
    if isinstance(left, dict):
        assert isinstance(right, dict)
        return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    if isinstance(left, tuple):
        assert isinstance(right, tuple)
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def test_a_batch_comes_back_as_it_was() -> None:
    batch = make_batch()
    found = flatten(batch).restore()
    assert same(found, batch)
    assert isinstance(found.maps[0], EncodedMaps)
    changed = dataclasses.replace(batch, answers=dataclasses.replace(batch.answers, token_R=torch.tensor([7, 8, 0])))
    assert not same(found, changed)


def test_all_its_tensors_lie_in_one_allocation_aligned() -> None:
    flat = flatten(make_batch())
    found = flat.restore()
    assert found.maps[0] is not None
    assert found.maps[0].windows is not None
    tensors = [*found.inputs.values(), found.logits_RQ, found.maps[0].codes_LC, found.maps[0].windows.flips_G]
    assert {tensor.untyped_storage().data_ptr() for tensor in tensors} == {flat.block.untyped_storage().data_ptr()}
    assert all((tensor.data_ptr() - flat.block.data_ptr()) % ALIGNMENT == 0 for tensor in tensors)


def test_an_empty_batch_can_be_flattened() -> None:
    none = torch.zeros(0, dtype=torch.long)
    batch = Batch(
        (), {"input_ids": torch.zeros(0, 0)}, AnswerRows(none, none, none), torch.zeros(0, 0, dtype=torch.uint8), (), ()
    )
    assert same(flatten(batch).restore(), batch)


def test_a_batch_moves_with_its_stored_maps_so_that_no_step_waits_for_a_copy() -> None:
    batch = make_batch()
    there = torch.device("meta")
    moved = batch.to(there, torch.bfloat16)
    assert moved.maps[1] is None
    assert moved.maps[0] is not None
    assert moved.maps[0].windows is not None
    assert batch.maps[0] is not None
    assert moved.maps[0].num_tokens == batch.maps[0].num_tokens
    for part, given in ((moved.maps[0], batch.maps[0]), (moved.maps[0].windows, batch.maps[0].windows)):
        tensors, given_tensors = (
            [value for value in vars(one).values() if isinstance(value, Tensor)] for one in (part, given)
        )
        assert {tensor.device for tensor in tensors} == {there}
        # Codes and exact values alike keep their precision.
        assert [tensor.dtype for tensor in tensors] == [tensor.dtype for tensor in given_tensors]
    assert same(batch.to(torch.device("cpu"), torch.float32), batch)
