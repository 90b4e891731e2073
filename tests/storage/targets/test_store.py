from dataclasses import replace
from pathlib import Path

import pytest

from storage.errors import UserError
from storage.integrity.verify import verify
from storage.stores import open_store
from storage.targets.manifest import create_or_check
from storage.targets.shard_writer import write_shard
from storage.targets.store import TargetStore
from tests.storage.builders import extract, manifest, pack, sample_targets


def test_a_sample_is_found_by_its_key_or_its_number_and_a_skipped_one_says_why(tmp_path: Path) -> None:
    extract(pack(tmp_path / "samples", (4, 3)), open_store(tmp_path / "targets"), skip=("s0-2", "s1-0"))
    store = TargetStore.open(tmp_path / "targets")
    assert [store.find(key) for key in ("s0-0", "s0-3", "s1-2")] == [(0, 0), (0, 2), (1, 1)]
    assert [store.find(str(number)) for number in range(5)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    with pytest.raises(UserError, match="sample s1-0 has no targets: too_long: 200 tokens"):
        store.find("s1-0")
    for name in ("5", "01", "-1", "9" * 5000, ""):
        with pytest.raises(UserError, match=r"has no sample .* among its 5; give a key"):
            store.find(name)


@pytest.mark.parametrize(("cut", "fitting"), [("whole_turns", 6), ("tokens", 8)])
def test_verify_finds_a_cut_sample_that_does_not_end_as_a_cut_leaves_it(tmp_path: Path, cut: str, fitting: int) -> None:
    made_for = manifest(2, max_length=8, cut=cut)
    store = open_store(tmp_path)
    create_or_check(store, made_for)
    for shard, size in enumerate((fitting, 7)):
        sample = replace(sample_targets(made_for, f"k{shard}", size, 2, None, 0), num_cut_answer_tokens=3)
        if shard:
            sample = replace(sample, answer_mask=sample.answer_mask.roll(-1))
        write_shard(store, shard, made_for, f"samples-{shard:06d}.tar", [sample], [], [])
    (finding,) = verify(tmp_path).findings
    assert (finding.part, finding.file) == (1, "cut_answer_tokens")
