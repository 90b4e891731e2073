"""One sample that the teacher fails on: what becomes of it, of its shard, and of everything else."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pipeline.extraction
import stages.teacher.forward
import stages.teacher.observe
from pipeline.extraction import ExtractConfig, ExtractionReport, extract
from pipeline.shard_extractor import ShardExtractor
from stages.teacher.forward import Observed
from stages.teacher.identity import TeacherConfig
from storage.errors import TooManySkipped, UserError
from storage.targets import TargetStore
from storage.verify import verify
from tests.conftest import NUM_SAMPLES, TinyWorld
from tests.pipeline.processes import tree

pytestmark = pytest.mark.usefixtures("ray_address")

LASTING = ("manifest.json", "teacher/", "shards/", "commits/")
POISON = "sample-000010"
"""The only conversation about its image."""


def meet_nan(sample: Any) -> None:
    """As of an overflow in the vision tower."""
    for pixels in sample.pixel_inputs.values():
        pixels.fill_(torch.nan)


def meet_little_memory(_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def meet_an_error(_: Any) -> None:
    raise RuntimeError("device-side assert triggered")


def meet_the_memory_killer(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Poisoned(ShardExtractor):
    """A worker that does something of its own when the sample is about to enter the teacher."""

    meet: Callable[[Any], None]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        healthy = stages.teacher.forward.run_teacher

        def run_teacher(teacher: Any, batch: Any, wanted: Any) -> list[Observed]:
            for sample in batch:
                if sample.id == POISON:
                    type(self).meet(sample)
            return healthy(teacher, batch, wanted)

        stages.teacher.observe.run_teacher = run_teacher


def poisoned_by(meet: Callable[[Any], None]) -> type[Poisoned]:
    return type("Poisoned", (Poisoned,), {"meet": staticmethod(meet)})


def run(tiny: TinyWorld, store: Path, **settings: Any) -> ExtractionReport:
    teacher = TeacherConfig(checkpoint=str(tiny.teacher))
    return extract(teacher, str(tiny.samples), str(store), ExtractConfig(workers=1, **settings))


@pytest.mark.parametrize(
    ("meet", "reason"),
    [pytest.param(meet_nan, "not_finite"), pytest.param(meet_little_memory, "out_of_memory", marks=pytest.mark.slow)],
)
def test_a_sample_the_teacher_cannot_see_is_in_the_ledger_and_every_other_has_its_bytes(
    meet: Callable[[Any], None],
    reason: str,
    tiny: TinyWorld,
    targets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = tmp_path / "store"
    monkeypatch.setattr(pipeline.extraction, "ShardExtractor", poisoned_by(meet))
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
        one, other = (each.read(each.row_of(key) or 0) for each in (shard, undisturbed))
        assert torch.equal(one[0].logits_RB, other[0].logits_RB)
        assert torch.equal(one[0].token_ids, other[0].token_ids)
        assert (one[1] is None) == (other[1] is None)
        if one[1] is not None and other[1] is not None:
            assert torch.equal(one[1].maps.codes_LC, other[1].maps.codes_LC)


@pytest.mark.parametrize(
    ("meet", "why"),
    [
        pytest.param(meet_an_error, "device-side assert triggered"),
        pytest.param(meet_the_memory_killer, "its worker process died", marks=pytest.mark.slow),
    ],
)
def test_a_sample_that_fails_its_worker_costs_its_shard_alone_and_a_rerun_without_the_fault_gives_the_same_bytes(
    meet: Callable[[Any], None],
    why: str,
    tiny: TinyWorld,
    targets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = tmp_path / "store"
    with monkeypatch.context() as patched:
        patched.setattr(pipeline.extraction, "ShardExtractor", poisoned_by(meet))
        with pytest.raises(UserError, match=rf"1 of \d+ shards could not be made(.|\n)*shard \d+: .*{why}"):
            run(tiny, store, max_attempts=2)
    report = ExtractionReport.model_validate_json((store / "reports/extraction.json").read_text())
    (poisoned,) = report.failures
    assert sum(one.counts for one in report.failed_tries[poisoned]) == 2
    assert not any(one.counts for shard, tries in report.failed_tries.items() if shard != poisoned for one in tries)
    opened = TargetStore.open(store)
    assert opened.commits.keys() == set(range(opened.manifest.num_shards)) - {poisoned}
    assert run(tiny, store).shards_made_now == 1
    assert tree(store, *LASTING) == tree(targets, *LASTING)
