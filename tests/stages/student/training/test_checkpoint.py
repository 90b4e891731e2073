"""Checkpoints of a stage: which stay, and what processes that write none take part in."""

import os
from collections.abc import Iterator
from pathlib import Path
from weakref import ref

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import get_cosine_schedule_with_warmup

from stages.student.training.checkpoint import TRAINED, Checkpoints, Position, TrainerState, trained_parameters
from stages.student.training.parallel import gathered
from storage.errors import FingerprintMismatch, StoreUnavailable


def trainer(device: str = "cpu") -> TrainerState:
    """One linear layer of 16 kB, after one step."""
    model = nn.Linear(64, 64, device=device)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return TrainerState(model, optimizer, get_cosine_schedule_with_warmup(optimizer, 1, 10))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def begun(folder: Path) -> None:
    """Checkpoints of steps 500 and 1000, the newer one damaged since."""
    state, both = trainer(), Checkpoints(folder, keep=2)
    both.save(Position(500), state)
    both.save(Position(1000), state)
    (folder / "step-00001000" / TRAINED).write_bytes(b"damaged")


@pytest.mark.parametrize(
    ("keep", "left"), [(1, ["step-00000600"]), (2, ["step-00000500", "step-00000600"])], ids=["one", "two"]
)
def test_a_damaged_checkpoint_counts_for_none_of_those_that_are_kept_and_goes_when_there_is_a_newer_one(
    keep: int, left: list[str], tmp_path: Path
) -> None:
    begun(tmp_path)
    checkpoints = Checkpoints(tmp_path, keep)
    assert checkpoints.restore(trainer()) == Position(500)
    assert names(tmp_path) == ["step-00000500", "step-00001000"]
    checkpoints.save(Position(600), trainer())
    assert names(tmp_path) == left
    assert Checkpoints(tmp_path, keep).restore(trainer()) == Position(600)


def test_a_damaged_checkpoint_between_whole_ones_does_not_count_either(tmp_path: Path) -> None:
    begun(tmp_path)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.restore(trainer())
    checkpoints.save(Position(1500), trainer())
    assert names(tmp_path) == ["step-00000500", "step-00001500"]


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_done_again(tmp_path: Path) -> None:
    begun(tmp_path)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.restore(trainer())
    checkpoints.save(Position(1000), trainer())
    assert names(tmp_path) == ["step-00001000"]
    assert Checkpoints(tmp_path, keep=1).restore(trainer()) == Position(1000)


def test_a_checkpoint_that_finds_no_room_removes_none_and_names_the_newest_whole_one(small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    begun(folder)
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.restore(trainer())
    room = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(room.f_bavail * room.f_frsize - 2**13))
    with pytest.raises(StoreUnavailable, match=r"step 600 was not saved; the newest one, .*/step-00000500, is whole"):
        checkpoints.save(Position(600), trainer())
    assert names(folder) == ["step-00000500", "step-00001000"]


def test_a_checkpoint_of_other_trained_parameters_is_refused_by_name(tmp_path: Path) -> None:
    state = trainer()
    Checkpoints(tmp_path, keep=1).save(Position(500), state)
    state.model.bias.requires_grad_(False)
    with pytest.raises(FingerprintMismatch, match=r"2 parameters were trained so far, 1 are .* 1 differ, such as bias"):
        Checkpoints(tmp_path, keep=1).restore(state)


def test_a_process_that_does_not_write_copies_no_tensor_to_the_cpu(tmp_path: Path) -> None:
    # What is on this device cannot be copied from it.
    state = trainer("meta")
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        Checkpoints(tmp_path, keep=1).save(Position(1), state)
    Checkpoints(tmp_path, keep=1, write=False).save(Position(1), state)
    assert gathered(trained_parameters(state.model), wanted=False) == {}
    assert names(tmp_path) == []


@pytest.fixture
def group_of_one() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
def test_a_process_that_does_not_write_takes_part_in_each_gather_and_holds_one_whole_tensor_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mesh = init_device_mesh("cpu", (1,))
    parts = {name: distribute_tensor(torch.arange(8.0), mesh) for name in "abc"}
    gather, whole = DTensor.full_tensor, list[ref[Tensor]]()

    def counted(part: DTensor) -> Tensor:
        assert not [one for one in whole if one() is not None]
        found = gather(part).clone()
        whole.append(ref(found))
        return found

    with monkeypatch.context() as patched:
        patched.setattr(DTensor, "full_tensor", counted)
        assert gathered(parts, wanted=False) == {}
    assert len(whole) == 3
    for tensor in gathered(parts, wanted=True).values():
        assert not isinstance(tensor, DTensor)
        assert torch.equal(tensor, torch.arange(8.0))
