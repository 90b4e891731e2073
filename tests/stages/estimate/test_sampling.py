from pathlib import Path

import pytest

from stages.estimate.sampling import UNITS, count_runs, plan_runs
from stages.teacher.identity import TeacherConfig
from stages.teacher.teacher import Teacher, load_teacher
from storage.errors import UserError
from storage.samples.index import SampleIndex
from storage.stores import open_store
from tests.stages.distilled import TinyData, extract_here, make_tiny_data


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """20 samples in shards of 8; two of five are of one image."""
    return make_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("num_samples", "num_runs", "num_counted"), [(1000, 8, 64), (100, 8, 1000), (3, 8, 64), (50, 7, 49)]
)
def test_runs_are_disjoint_and_lie_within_the_set(num_samples: int, num_runs: int, num_counted: int) -> None:
    runs = plan_runs(num_samples, num_runs, num_counted, seed=1)
    drawn = [number for run in runs for number in run]
    assert drawn == sorted(set(drawn))
    assert drawn[0] >= 0
    assert drawn[-1] < num_samples
    assert len(drawn) >= min(num_counted, num_samples) * 0.9


def test_enough_counted_samples_are_the_whole_set_and_the_seed_moves_the_runs() -> None:
    assert [number for run in plan_runs(101, 8, 200, seed=0) for number in run] == list(range(101))
    assert plan_runs(1000, 8, 64, seed=0) == plan_runs(1000, 8, 64, seed=0)
    assert plan_runs(1000, 8, 64, seed=0) != plan_runs(1000, 8, 64, seed=1)


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(UserError, match="empty"):
        plan_runs(0, 8, 64, seed=0)


def test_counts_of_the_whole_set_are_those_that_extraction_commits(tiny_data: TinyData, tmp_path: Path) -> None:
    teacher = load_teacher(TeacherConfig(checkpoint=str(tiny_data.teacher)))
    found = _counted(teacher, tiny_data, plan_runs(20, 5, 20, seed=0))
    records = extract_here(tiny_data, tmp_path / "targets").commits.values()
    assert found["samples"] == sum(record.num_samples for record in records)
    assert found["tokens"] == sum(record.num_tokens for record in records)
    assert found["answer_rows"] == sum(record.num_answer_rows for record in records)
    assert found["maps"] == pytest.approx(sum(record.num_maps for record in records))


def test_runs_of_one_sample_find_as_many_maps_as_one_run_of_all(tiny_data: TinyData) -> None:
    teacher = load_teacher(TeacherConfig(checkpoint=str(tiny_data.teacher)))
    together = _counted(teacher, tiny_data, [range(20)])
    alone = _counted(teacher, tiny_data, [range(number, number + 1) for number in range(20)])
    assert 0 < together["maps"] < together["samples"]
    assert alone == pytest.approx(together)


def _counted(teacher: Teacher, data: TinyData, runs: list[range]) -> dict[str, float]:
    store = open_store(data.samples)
    counted = count_runs(store, SampleIndex.load(store), teacher.encoder, runs, causal=True)
    return {unit: sum(run.counts[unit] for run in counted) for unit in UNITS}
