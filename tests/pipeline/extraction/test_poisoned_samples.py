"""One sample that the teacher fails on: what becomes of it, of its shard, and of everything else."""

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import pipeline.extraction.extract
from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.extract import extract
from pipeline.extraction.report import ExtractionReport
from pipeline.extraction.shard_extractor import ShardExtractor
from stages.teacher.batching import PreparedSample
from stages.teacher.config import TeacherConfig
from storage.errors import TooManySkipped, UserError
from storage.integrity.verify import verify
from storage.samples.sample_set import SampleSet
from storage.stores import open_store
from storage.targets.store import TargetStore
from tests.conftest import NUM_SAMPLES, TinyWorld
from tests.pipeline.in_process import without_ray
from tests.pipeline.processes import tree
from tests.stages.teacher.forward_passes import before_each_pass

pytestmark = pytest.mark.usefixtures("ray_address")

LASTING = ("manifest.json", "teacher/", "shards/", "commits/")
POISON = "sample-000010"
"""The only conversation about its image."""


def meet_nan(sample: Any) -> None:
    """As of an overflow in the vision tower."""
    for pixels in sample.encoded.pixel_inputs.values():
        pixels.fill_(torch.nan)


def meet_little_memory(_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def meet_an_error(_: Any) -> None:
    raise RuntimeError("index 7 is out of bounds")


def meet_the_memory_killer(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Poisoned(ShardExtractor):
    """A worker that does something of its own when the sample is about to enter the teacher."""

    meet: Callable[[Any], None]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)

        def meet(batch: Sequence[PreparedSample]) -> None:
            if BrokenGpu.broken:
                raise RuntimeError("CUDA error: device-side assert triggered")
            for sample in batch:
                if sample.id == POISON:
                    type(self).meet(sample)

        before_each_pass(setattr, meet)


class BrokenGpu:
    """After the first sample that raises every other raises too, until the process is replaced."""

    broken = False


def meet_a_device_assert(_: Any) -> None:
    BrokenGpu.broken = True
    raise RuntimeError("CUDA error: device-side assert triggered")


def poisoned_by(meet: Callable[[Any], None]) -> type[Poisoned]:
    return type("Poisoned", (Poisoned,), {"meet": staticmethod(meet)})


def run(tiny: TinyWorld, store: Path, **settings: Any) -> ExtractionReport:
    teacher = TeacherConfig(checkpoint=str(tiny.teacher))
    return extract(teacher, str(tiny.samples), str(store), ExtractConfig(workers=1, **settings))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("meet", "reason"),
    [
        (meet_nan, "not_finite"),
        (meet_little_memory, "out_of_memory"),
        (meet_an_error, "teacher_error"),
        (meet_the_memory_killer, "kills_worker"),
        (meet_a_device_assert, "kills_worker"),
    ],
)
def test_a_sample_the_teacher_cannot_take_is_in_the_ledger_and_every_other_has_its_bytes(
    meet: Callable[[Any], None],
    reason: str,
    tiny: TinyWorld,
    targets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = tmp_path / "store"
    monkeypatch.setattr(pipeline.extraction.extract, "ShardExtractor", poisoned_by(meet))
    with pytest.raises(TooManySkipped, match=rf"1 of {NUM_SAMPLES} samples could not be used \({reason}: 1\)"):
        run(tiny, store)
    assert verify(store, tiny.samples).ok
    found, expected = TargetStore.open(store), TargetStore.open(targets)
    ((poisoned, skipped),) = [(c.shard, one) for c in found.commits.values() for one in c.skipped]
    assert (skipped.id, skipped.reason) == (POISON, reason)
    ours, theirs = tree(store, *LASTING), tree(targets, *LASTING)
    of_the_shard = (f"shards/{poisoned:06d}-", f"commits/{poisoned:06d}.json")
    assert {name: data for name, data in ours.items() if not name.startswith(of_the_shard)} == {
        name: data for name, data in theirs.items() if not name.startswith(of_the_shard)
    }
    shard, undisturbed = found.shard(poisoned), expected.shard(poisoned)
    assert set(undisturbed.keys) - set(shard.keys) == {skipped.key}
    for key in shard.keys:
        one, other = (each.read(each.keys.index(key)) for each in (shard, undisturbed))
        assert torch.equal(one[0].logits_RQ, other[0].logits_RQ)
        assert torch.equal(one[0].token_ids, other[0].token_ids)
        assert (one[1] is None) == (other[1] is None)
        if one[1] is not None and other[1] is not None:
            assert torch.equal(one[1].codes_LC, other[1].codes_LC)


@pytest.mark.slow
def test_which_sample_is_at_fault_is_in_the_ledger_and_how_it_was_found_in_the_report(
    tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    monkeypatch.setattr(pipeline.extraction.extract, "ShardExtractor", poisoned_by(meet_the_memory_killer))
    report = run(tiny, store, max_attempts=2, max_skipped_fraction=0.1)
    assert (report.skipped, report.failures) == ({"kills_worker": 1}, {})
    ((poisoned, tries),) = [
        (shard, tries) for shard, tries in report.failed_tries.items() if any(one.position is not None for one in tries)
    ]
    (skipped,) = TargetStore.open(store).commits[poisoned].skipped
    samples = open_store(str(tiny.samples))
    with SampleSet.open(samples).shard(poisoned) as shard:
        at_fault = [shard.read(row).key for row in range(len(shard))].index(skipped.key)
    assert [one.position for one in tries if one.position is not None] == [at_fault, at_fault]
    assert sum(one.counts for one in tries) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("meet", "why"),
    [(meet_an_error, "index 7 is out of bounds"), (meet_the_memory_killer, "its worker process died")],
)
def test_with_one_attempt_a_shard_is_given_up_unsearched_and_a_rerun_without_the_fault_gives_the_same_bytes(
    meet: Callable[[Any], None],
    why: str,
    tiny: TinyWorld,
    targets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = tmp_path / "store"
    with monkeypatch.context() as patched:
        patched.setattr(pipeline.extraction.extract, "ShardExtractor", poisoned_by(meet))
        with pytest.raises(UserError, match=rf"1 of \d+ shards could not be made(.|\n)*shard \d+: .*{why}"):
            run(tiny, store, max_attempts=1)
    _only_the_poisoned_shard_is_missing(store)
    with without_ray():
        assert run(tiny, store).shards_made_now == 1
    assert tree(store, *LASTING) == tree(targets, *LASTING)


class FullDisk(ShardExtractor):
    """Not the sample's fault: from one sample on, reading and writing raise what a disk raises."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)

        def meet(batch: Sequence[PreparedSample]) -> None:
            if any(sample.id == POISON for sample in batch):
                raise OSError(28, "No space left on device")

        before_each_pass(setattr, meet)


class BrokenEnvironment(ShardExtractor):
    """Not the samples' fault: nothing at all goes through, once the first shard is made."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)

        def meet(_: Sequence[PreparedSample]) -> None:
            raise RuntimeError("no kernel image is available for execution on the device")

        before_each_pass(setattr, meet)


@pytest.mark.slow
def test_a_fault_of_the_disk_puts_no_sample_into_the_ledger_and_a_rerun_gives_the_same_bytes(
    tiny: TinyWorld, targets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    with monkeypatch.context() as patched:
        patched.setattr(pipeline.extraction.extract, "ShardExtractor", FullDisk)
        with pytest.raises(UserError, match=r"1 of \d+ shards could not be made(.|\n)*No space left on device"):
            run(tiny, store)
    _only_the_poisoned_shard_is_missing(store)
    with without_ray():
        run(tiny, store)
    assert tree(store, *LASTING) == tree(targets, *LASTING)


@pytest.mark.slow
def test_a_teacher_that_takes_no_sample_at_all_puts_none_into_the_ledger(
    tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    monkeypatch.setattr(pipeline.extraction.extract, "ShardExtractor", BrokenEnvironment)
    with pytest.raises(UserError, match="the teacher fails on other samples too: RuntimeError: no kernel image"):
        run(tiny, store, max_attempts=2)
    assert TargetStore.open(store).commits == {}


def _only_the_poisoned_shard_is_missing(store: Path) -> None:
    report = ExtractionReport.model_validate_json((store / "reports/extraction.json").read_text())
    (poisoned,) = report.failures
    opened = TargetStore.open(store)
    assert opened.commits.keys() == set(range(opened.manifest.num_shards)) - {poisoned}
    assert not any(commit.skipped for commit in opened.commits.values())
