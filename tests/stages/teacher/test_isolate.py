"""The samples of a shard one by one: who is put into the ledger, and who is not."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from stages.teacher.batching import PreparedSample, SamplePreparer
from stages.teacher.config import TeacherConfig
from stages.teacher.isolate import NOWHERE, TeacherUnusable, run_isolated
from stages.teacher.observe import ShardObservations
from stages.teacher.teacher import Teacher, load_teacher
from storage.errors import StoreUnavailable
from storage.samples.sample_set import SampleSet
from storage.samples.shard_reader import SampleShard
from storage.stores import open_store
from tests.stages.distilled import TinyData, make_tiny_data, observe_shard
from tests.stages.teacher.forward_passes import before_each_pass

BAD = 1
"""Row of the sample at fault."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_tiny_data(tmp_path_factory.mktemp("apart"), num_samples=15)


@pytest.fixture(scope="module")
def teacher(data: TinyData) -> Teacher:
    return load_teacher(TeacherConfig(checkpoint=str(data.teacher), batch_size=3, top_k=5))


def opened(data: TinyData) -> SampleShard:
    store = open_store(data.samples)
    return SampleSet.open(store).shard(0)


def apart(
    teacher: Teacher, data: TinyData, crashing_rows: tuple[int, ...] = (), progress: list[int] | None = None
) -> tuple[ShardObservations, list[int]]:
    """With the shard's last sample as the control; what was seen, and the places that were told."""
    places: list[int] = []
    with opened(data) as shard:
        seen = run_isolated(
            teacher,
            shard,
            controls=[(shard, len(shard) - 1)],
            crashing_rows=crashing_rows,
            at=places.append,
            progress=progress.append if progress is not None else None,
        )
    return seen, places


def same(one: ShardObservations, other: ShardObservations) -> bool:
    """Whether all samples of `one` are in `other`, with the same bytes."""
    others = {sample.key: sample for sample in other.samples}
    return all(
        torch.equal(sample.logits_RQ, others[sample.key].logits_RQ)
        and (
            sample.map_row is None
            or torch.equal(one.maps[sample.map_row].codes_LC, other.maps[others[sample.key].map_row].codes_LC)
        )
        for sample in one.samples
    )


def when_met(monkeypatch: pytest.MonkeyPatch, meet: Callable[[], None], *rows: int) -> None:
    """Calls `meet` when one of these rows is about to enter the teacher."""

    def look(batch: Sequence[PreparedSample]) -> None:
        if any(sample.row in rows for sample in batch):
            meet()

    before_each_pass(monkeypatch.setattr, look)


def raising(error: Exception) -> Callable[[], None]:
    def meet() -> None:
        raise error

    return meet


def test_a_shard_without_a_fault_is_what_it_is_in_batches_and_each_row_is_told_before_it_is_touched(
    teacher: Teacher, data: TinyData
) -> None:
    progress: list[int] = []
    seen, places = apart(teacher, data, progress=progress)
    with opened(data) as shard:
        expected = observe_shard(teacher, shard)
    assert len(seen.samples) == len(expected.samples) == sum(progress)
    assert len(seen.maps) == len(expected.maps)
    assert same(seen, expected)
    assert places == [NOWHERE, *range(len(expected.samples)), NOWHERE]


def test_a_sample_that_raises_or_killed_is_in_the_ledger_and_its_map_is_taken_of_the_next_that_shares_it(
    teacher: Teacher, data: TinyData, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(data) as shard:
        expected = observe_shard(teacher, shard)
        keys = [shard.read(row).key for row in range(len(shard))]
    shared = [sample.map_row for sample in expected.samples]
    owner = next(row for row, map_row in enumerate(shared) if map_row is not None and shared.count(map_row) > 1)
    killer = next(row for row in range(len(keys)) if row != owner)
    when_met(monkeypatch, raising(RuntimeError("index out of bounds")), owner)
    progress: list[int] = []
    seen, places = apart(teacher, data, (killer,), progress)
    assert {(one.key, one.reason) for one in seen.skipped} == {
        (keys[owner], "teacher_error"),
        (keys[killer], "kills_worker"),
    }
    (fault,) = [one for one in seen.skipped if one.reason == "teacher_error"]
    assert fault.detail == "RuntimeError: index out of bounds"
    assert killer not in places
    assert sum(progress) == len(keys)
    assert {sample.key for sample in seen.samples} == set(keys) - {keys[owner], keys[killer]}
    assert same(seen, expected)


def test_a_sample_whose_preparation_raises_is_in_the_ledger(
    teacher: Teacher, data: TinyData, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = SamplePreparer.make

    def make(maker: SamplePreparer, row: int, sample: Any) -> Any:
        if row == BAD:
            raise TypeError("the processor takes no such image")
        return healthy(maker, row, sample)

    monkeypatch.setattr(SamplePreparer, "make", make)
    seen, _ = apart(teacher, data)
    assert [(one.reason, one.detail) for one in seen.skipped] == [
        ("teacher_error", "TypeError: the processor takes no such image")
    ]


def test_a_sample_that_raises_once_is_not_to_blame(
    teacher: Teacher, data: TinyData, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = [RuntimeError("a cosmic ray")]

    def meet() -> None:
        if faults:
            raise faults.pop()

    when_met(monkeypatch, meet, BAD)
    seen, _ = apart(teacher, data)
    with opened(data) as shard:
        assert same(observe_shard(teacher, shard), seen)
    assert seen.skipped == []


@pytest.mark.parametrize(
    "error", [StoreUnavailable("the disk is full"), OSError(5, "Input/output error"), MemoryError("no memory")]
)
def test_what_the_machine_raises_is_nobodys_fault(
    error: Exception, teacher: Teacher, data: TinyData, monkeypatch: pytest.MonkeyPatch
) -> None:
    when_met(monkeypatch, raising(error), BAD)
    with pytest.raises(type(error)):
        apart(teacher, data)


def test_a_teacher_that_fails_on_everything_after_a_sample_is_unusable_and_blames_none_itself(
    teacher: Teacher, data: TinyData, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: list[bool] = []

    def meet(batch: Sequence[PreparedSample]) -> None:
        if broken or batch[0].row == BAD:
            broken.append(True)
            raise RuntimeError("CUDA error: device-side assert triggered")

    before_each_pass(monkeypatch.setattr, meet)
    with pytest.raises(TeacherUnusable, match=r"since sample .* the teacher fails on others too: .*device-side assert"):
        apart(teacher, data)


def test_a_teacher_that_takes_no_control_is_not_asked_for_samples(
    teacher: Teacher, data: TinyData, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(data) as shard:
        everything = range(len(shard))
    when_met(monkeypatch, raising(RuntimeError("no kernel image")), *everything)
    with pytest.raises(RuntimeError, match="the teacher fails on other samples too: RuntimeError: no kernel image"):
        apart(teacher, data)
