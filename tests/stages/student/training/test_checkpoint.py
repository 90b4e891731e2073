"""Checkpoints of a stage: which stay, and what processes that write none take part in."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import get_cosine_schedule_with_warmup

from stages.student.training.checkpoint import (
    OPTIMIZER,
    STATE,
    TRAINED,
    Checkpoints,
    Position,
    TrainerState,
    trained_parameters,
)
from stages.student.training.parallel import gathered
from storage.digests import digest_of, file_sha256
from storage.errors import FingerprintMismatch, StoreUnavailable, UserError


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


def forge(folder: Path, *, state: dict[str, Any] | None = None, **files: bytes | dict[str, Tensor]) -> None:
    """Puts other values into a checkpoint and makes its digests right."""
    for name, content in files.items():
        path = folder / f"{name}.safetensors"
        path.write_bytes(content if isinstance(content, bytes) else save(content))
    written = json.loads((folder / STATE).read_text()) | (state or {})
    written["sha256"] = {name: file_sha256(folder / name) for name in (TRAINED, OPTIMIZER)}
    del written["digest"]
    (folder / STATE).write_text(json.dumps({**written, "digest": digest_of(written)}))


MOMENT = "weight.exp_avg"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
FORGED: dict[str, tuple[dict[str, Any], str]] = {
    "no safetensors file": ({"trained": b"x"}, "SafetensorError"),
    "a parameter of another shape": ({"trained": {"weight": torch.ones(1), "bias": torch.ones(64)}}, "had shape"),
    "no moments of a step": ({"optimizer": {MOMENT: torch.ones(64, 64)}}, "holds, or lacks, weight.exp_avg_sq"),
    "moments of no parameter": ({"optimizer": {f"other.{k}": torch.ones(()) for k in MOMENTS}}, "KeyError: 'other'"),
    "a name without a dot": ({"optimizer": {"step": torch.ones(())}}, "holds, or lacks"),
    "moments of another shape": ({"optimizer": {f"bias.{k}": torch.ones(()) for k in MOMENTS}}, r"shape \[\]"),
    "no position": ({"state": {"position": None}}, "validation error"),
    "a position before the start": ({"state": {"position": {"step": -1}}}, "greater than or equal to 0"),
    "a position of a later version": ({"state": {"position": {"step": 1, "more": 1}}}, "more"),
    "a schedule of another kind": ({"state": {"scheduler": {"last_epoch": "1"}}}, "scheduler.last_epoch is '1'"),
    "no rates": ({"state": {"scheduler": {"_last_lr": []}}}, r"scheduler._last_lr is \[\]"),
    "rates that are none": ({"state": {"scheduler": {"_last_lr": ["a"]}}}, "scheduler._last_lr is"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_checkpoint_with_right_digests_that_is_not_the_state_of_the_stage_is_refused(
    case: str, tmp_path: Path
) -> None:
    Checkpoints(tmp_path, keep=1).save(Position(500), trainer())
    forged, expected = FORGED[case]
    forge(tmp_path / "step-00000500", **forged)
    with pytest.raises(UserError, match=f"(?s)step-00000500.*{expected}"):
        Checkpoints(tmp_path, keep=1).restore(trainer())


def test_a_schedule_sets_only_what_this_version_of_the_library_has(tmp_path: Path) -> None:
    Checkpoints(tmp_path, keep=1).save(Position(500), trainer())
    state = json.loads((tmp_path / "step-00000500" / STATE).read_text())["scheduler"]
    forge(tmp_path / "step-00000500", state={"scheduler": {**state, "optimizer": 1, "step": 2, "_of_later": 3}})
    restored = trainer()
    assert Checkpoints(tmp_path, keep=1).restore(restored) == Position(500)
    assert restored.scheduler.optimizer is restored.optimizer


@pytest.mark.parametrize("state", [b"[" * 10**5, b"[]", b"{}", b'{"digest": 1}', b'{"sha256": {"/etc/passwd": ""}}'])
def test_a_checkpoint_with_a_state_that_is_none_counts_as_damaged(state: bytes, tmp_path: Path) -> None:
    Checkpoints(tmp_path, keep=1).save(Position(500), trainer())
    (tmp_path / "step-00000500" / STATE).write_bytes(state)
    with pytest.raises(UserError, match="all 1 checkpoints"):
        Checkpoints(tmp_path, keep=1).restore(trainer())
