from pathlib import Path

import pytest

from stages.estimate.report import EstimateConfig
from stages.estimate.sampling import UNITS, count_blocks, plan_blocks
from stages.teacher.config import TeacherConfig
from stages.teacher.teacher import Teacher, load_teacher
from storage.errors import UserError
from storage.samples.sample_set import SampleSet
from tests.stages.distilled import TinyData, extract_here, make_tiny_data


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """20 samples in shards of 8; two of five are of one image."""
    return make_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("num_samples", "num_blocks", "num_sampled"), [(1000, 8, 64), (100, 8, 1000), (3, 8, 64), (50, 7, 49)]
)
def test_blocks_are_disjoint_and_lie_within_the_set(num_samples: int, num_blocks: int, num_sampled: int) -> None:
    blocks = _planned(num_samples, num_blocks, num_sampled, seed=1)
    drawn = [number for block in blocks for number in block]
    assert drawn == sorted(set(drawn))
    assert drawn[0] >= 0
    assert drawn[-1] < num_samples
    assert len(drawn) >= min(num_sampled, num_samples) * 0.9


def test_enough_samples_are_the_whole_set_and_the_seed_moves_the_blocks() -> None:
    assert [number for block in _planned(101, 8, 200, seed=0) for number in block] == list(range(101))
    assert _planned(1000, 8, 64, seed=0) == _planned(1000, 8, 64, seed=0)
    assert _planned(1000, 8, 64, seed=0) != _planned(1000, 8, 64, seed=1)


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(UserError, match="empty"):
        _planned(0, 8, 64, seed=0)


def test_counts_of_the_whole_set_are_those_that_extraction_commits(tiny_data: TinyData, tmp_path: Path) -> None:
    teacher = load_teacher(TeacherConfig(checkpoint=str(tiny_data.teacher)))
    found = _counted(teacher, tiny_data, _planned(20, 5, 20, seed=0))
    store = extract_here(tiny_data, tmp_path / "targets", answer_attention=True)
    records = store.commits.values()
    assert found["samples"] == sum(record.num_samples for record in records)
    assert found["tokens"] == sum(record.num_tokens for record in records)
    assert found["answer_rows"] == sum(record.num_answer_rows for record in records)
    assert found["maps"] == pytest.approx(sum(record.num_maps for record in records))
    stored = [int(store.shard(number)._small["answer_attention_offsets"][-1]) for number in store.commits]
    assert found["answer_keys"] == sum(stored) > 0


def test_blocks_of_one_sample_find_as_many_maps_as_one_block_of_all(tiny_data: TinyData) -> None:
    teacher = load_teacher(TeacherConfig(checkpoint=str(tiny_data.teacher)))
    together = _counted(teacher, tiny_data, [range(20)])
    alone = _counted(teacher, tiny_data, [range(number, number + 1) for number in range(20)])
    assert 0 < together["maps"] < together["samples"]
    assert alone == pytest.approx(together)


def _planned(num_samples: int, num_blocks: int, num_sampled: int, seed: int) -> list[range]:
    return plan_blocks(num_samples, EstimateConfig(num_blocks=num_blocks, num_sampled=num_sampled, seed=seed))


def _counted(teacher: Teacher, data: TinyData, blocks: list[range]) -> dict[str, float]:
    counted = count_blocks(SampleSet.open(data.samples), teacher.encoder, blocks, causal=True).blocks
    return {unit: sum(block.counts[unit] for block in counted) for unit in UNITS}
