"""Every kind of damage is found and named; what is set aside is made again, byte for byte."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.digests import canonical_json, digest_of
from storage.errors import StoreUnavailable, UserError
from storage.integrity.findings import VerifyReport
from storage.integrity.repair import repair
from storage.integrity.verify import verify
from storage.regular_files import MAX_BYTES
from storage.samples.sample_set import SampleSet
from storage.stores import LocalStore, open_store
from storage.targets.commits import CommitRecord
from storage.targets.manifest import Manifest
from storage.targets.store import TargetStore
from storage.targets.teacher_assets import save_teacher
from tests.recorded_progress import RecordedProgress
from tests.storage.builders import extract, files_of, pack

SHARD_SIZES = (5, 3, 4)


def extract_all(samples: Path, targets: Path) -> None:
    """What `cdp extract-teacher` leaves."""
    store = open_store(targets)
    extract(SampleSet.open(samples), store)
    if not store.exists("commits/teacher.json"):
        staged = store.staging("teacher")
        (staged / "config.json").write_text('{"model_type": "llava"}')
        (staged / "model.safetensors").write_bytes(bytes(range(256)) * 9)
        save_teacher(store, Manifest.load(store), staged)
    num_shards = len(TargetStore.open(store).commits)
    store.write("reports/extraction.json", json.dumps({"shards": num_shards}).encode())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`samples/` and `targets/`, complete; tests copy it."""
    root = tmp_path_factory.mktemp("whole")
    pack(root / "samples", SHARD_SIZES)
    extract_all(root / "samples", root / "targets")
    return root


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    root = tmp_path / "copy"
    shutil.copytree(whole, root)
    return root


def check(root: Path, **options: float) -> VerifyReport:
    return verify(root / "targets", root / "samples", **options)  # type: ignore[arg-type]


def place_of(path: str) -> tuple[str, str]:
    """(shard, file) by which a finding names a path of the store."""
    folder, _, rest = path.partition("/")
    name, _, below = rest.partition("/")
    if folder == "shards":
        return str(int(name[:6])), below
    if folder == "teacher":
        return "teacher", below
    if folder == "commits":
        return ("teacher" if rest == "teacher.json" else str(int(rest[:6]))), path
    return "-", path


def flip(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(bytes(data))


def lasting(root: Path) -> dict[str, bytes]:
    return {path: data for path, data in files_of(root / "targets").items() if not path.startswith("quarantine/")}


def test_the_undamaged_store_is_whole(whole):
    report = check(whole)
    assert report.ok
    assert (report.num_planned, report.num_committed, report.num_read, report.missing) == (3, 3, 3, ())
    assert report.num_samples == sum(SHARD_SIZES)


def test_progress_counts_the_shards_and_the_tars_that_are_read(whole):
    progress = RecordedProgress()
    verify(whole / "targets", whole / "samples", progress=progress)
    task = progress.named("verify")
    assert (task.done, task.total, task.unit) == (2 * len(SHARD_SIZES), 2 * len(SHARD_SIZES), "shards")


@pytest.mark.parametrize("num_positions", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_a_flipped_bit_anywhere_in_any_file_is_found_and_named(tmp_path, num_positions):
    pack(tmp_path / "samples", (3,))
    targets = tmp_path / "targets"
    extract_all(tmp_path / "samples", targets)
    chance = random.Random(num_positions)
    paths = [path for path in sorted(files_of(targets)) if not path.startswith("reports/")]
    assert {path.partition("/")[0] for path in paths} == {"manifest.json", "commits", "shards", "teacher"}
    for path in paths:
        file = targets / path
        clean = file.read_bytes()
        for position in chance.choices(range(len(clean)), k=num_positions):
            flip(file, position, chance.randrange(8))
            named = {(str(finding.part), finding.file) for finding in verify(targets).findings}
            assert named == {place_of(path)}, (path, position)
            file.write_bytes(clean)
    assert verify(targets, tmp_path / "samples").ok


@pytest.mark.parametrize("num_positions", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_a_flipped_bit_anywhere_in_the_samples_is_found_and_named(damaged, num_positions):
    chance = random.Random(num_positions)
    for file in sorted((damaged / "samples").iterdir()):
        clean = file.read_bytes()
        for position in chance.sample(range(len(clean)), num_positions):
            flip(file, position, chance.randrange(8))
            named = {finding.file for finding in check(damaged).findings}
            assert file.name in named, (file.name, position)
            file.write_bytes(clean)


def _swap(left: Path, right: Path) -> None:
    spare = left.with_name("spare")
    left.rename(spare)
    right.rename(left)
    spare.rename(right)


def _edit_json(path: Path, **changes: object) -> None:
    """Change fields and make the digest right again, as a forger would."""
    fields = json.loads(path.read_bytes())
    fields = {**fields, **changes}
    names = ("digest", "path") if "path" in fields else ("digest",)
    fields["digest"] = digest_of({key: value for key, value in fields.items() if key not in names})
    path.write_bytes(canonical_json(fields))


def _folder(targets: Path, shard: int) -> Path:
    return targets / TargetStore.open(targets).commits[shard].path


DAMAGES: dict[str, tuple[Callable[[Path], object], set[tuple[str, str]]]] = {
    "a missing chunk": (lambda t: (_folder(t, 1) / "map_codes/c/0/0").unlink(), {("1", "map_codes/c/0/0")}),
    "a truncated chunk": (
        lambda t: (_folder(t, 1) / "map_codes/c/0/0").write_bytes(b"\0"),
        {("1", "map_codes/c/0/0")},
    ),
    "a missing zarr.json": (lambda t: (_folder(t, 0) / "token_ids/zarr.json").unlink(), {("0", "token_ids/zarr.json")}),
    "chunks swapped within a shard": (
        lambda t: _swap(_folder(t, 0) / "token_offsets/c/0", _folder(t, 0) / "logit_offsets/c/0"),
        {("0", "token_offsets/c/0"), ("0", "logit_offsets/c/0")},
    ),
    "chunks swapped between shards": (
        lambda t: _swap(_folder(t, 0) / "sample_keys/c/0", _folder(t, 2) / "sample_keys/c/0"),
        {("0", "sample_keys/c/0"), ("2", "sample_keys/c/0")},
    ),
    "records swapped": (
        lambda t: _swap(t / "commits/000000.json", t / "commits/000002.json"),
        {("0", "commits/000000.json"), ("2", "commits/000002.json")},
    ),
    "a strange file in a shard": (
        lambda t: (_folder(t, 2) / "map_codes/c/0/9").write_bytes(b"x"),
        {("2", "map_codes/c/0/9")},
    ),
    "a strange record": (lambda t: (t / "commits/0000001.json").write_bytes(b"{}"), {("-", "commits/0000001.json")}),
    "a record of no shard": (
        lambda t: shutil.copy(t / "commits/000001.json", t / "commits/000003.json"),
        {("3", "commits/000003.json"), ("-", "commits/000003.json")},
    ),
    "a record removed": (lambda t: (t / "commits/000001.json").unlink(), {("1", "commits/000001.json")}),
    "a shard removed with its record": (
        lambda t: (shutil.rmtree(_folder(t, 1)), (t / "commits/000001.json").unlink()),
        {("1", "commits/000001.json")},
    ),
    "a forged record": (
        lambda t: _edit_json(t / "commits/000002.json", num_samples=3),
        {("2", "commits/000002.json")},
    ),
    "an edited manifest": (lambda t: _edit_json(t / "manifest.json", hidden_size=17), {("-", "manifest.json")}),
    "a manifest of fewer shards": (lambda t: _edit_json(t / "manifest.json", num_shards=2), {("-", "manifest.json")}),
    "a missing file of the teacher": (
        lambda t: next((t / "teacher").glob("*/config.json")).unlink(),
        {("teacher", "config.json")},
    ),
    "no teacher": (
        lambda t: (shutil.rmtree(t / "teacher"), (t / "commits/teacher.json").unlink()),
        {("teacher", "commits/teacher.json")},
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_set_aside_and_a_new_extraction_gives_the_undamaged_bytes(whole, damaged, damage):
    do_damage, expected = DAMAGES[damage]
    do_damage(damaged / "targets")
    report = check(damaged)
    assert {(str(finding.part), finding.file) for finding in report.findings} >= expected
    blamed = {shard for shard, _ in expected}
    assert {str(finding.part) for finding in report.findings} == blamed
    before = files_of(damaged / "targets")
    repaired = repair(report)
    # Nothing is lost: every byte lies at its place or aside.
    kept = {
        path.partition("/")[2].partition("/")[2] if path.startswith("quarantine/") else path: data
        for path, data in files_of(damaged / "targets").items()
    }
    kept.pop("findings.json", None)
    assert kept == before
    if repaired.folder:
        reasons = json.loads((damaged / "targets" / repaired.folder / "findings.json").read_text())
        assert len(reasons["findings"]) == len(report.findings)
        assert {str(finding["part"]) for finding in reasons["findings"]} == blamed
    extract_all(damaged / "samples", damaged / "targets")
    assert lasting(damaged) == files_of(whole / "targets")
    assert check(damaged).ok


def test_a_second_repair_has_a_folder_of_its_own_and_a_whole_store_none(damaged):
    assert repair(check(damaged)).folder is None
    for number in range(2):
        (_folder(damaged / "targets", 0) / "zarr.json").unlink()
        assert repair(check(damaged)).folder == f"quarantine/{number:04d}"
        extract_all(damaged / "samples", damaged / "targets")
    assert check(damaged).ok


@pytest.mark.parametrize("name", ["samples-000001.tar", "samples-000001.json"])
def test_damaged_samples_are_named_and_never_moved(damaged, name):
    (damaged / "samples" / name).write_bytes(b"short")
    before = files_of(damaged)
    report = check(damaged)
    # A table is held by what the index says of it alone, so that either may be wrong.
    doubted = {("samples", "index.json")} if name.endswith(".json") else set()
    assert {(str(finding.part), finding.file) for finding in report.findings} == {
        ("samples-000001.tar", name)
    } | doubted
    repaired = repair(report)
    assert repaired.moved == ()
    assert repaired.left == report.findings
    assert files_of(damaged) == before


def test_samples_packed_anew_from_other_data_are_named(damaged, tmp_path):
    pack(tmp_path / "other", (5, 3, 3))
    shutil.rmtree(damaged / "samples")
    shutil.copytree(tmp_path / "other", damaged / "samples")
    named = {(str(finding.part), finding.file) for finding in check(damaged).findings}
    assert ("samples", "index.json") in named
    assert any(shard == "2" for shard, _ in named)


def test_a_share_reads_some_shards_by_its_seed_and_all_records_and_sizes_always(damaged):
    targets = damaged / "targets"
    file = _folder(targets, 1) / "map_codes/c/0/0"
    flip(file, 3, 0)
    found = {seed: not verify(targets, percent=34, seed=seed).ok for seed in range(6)}
    assert set(found.values()) == {True, False}
    assert found == {seed: not verify(targets, percent=34, seed=seed).ok for seed in range(6)}
    report = verify(targets, percent=1)
    assert (report.num_read, report.num_committed) == (1, 3)
    file.write_bytes(file.read_bytes()[:-1])
    assert all(not verify(targets, percent=1, seed=seed).ok for seed in range(3))
    with pytest.raises(UserError, match="more than 0"):
        verify(targets, percent=0)


def test_a_store_that_does_not_answer_is_an_error_and_no_finding(damaged, monkeypatch):
    def refuse(self: LocalStore, path: str) -> None:
        raise StoreUnavailable(f"{path}: the disk is away")

    monkeypatch.setattr(LocalStore, "as_stored", refuse)
    with pytest.raises(StoreUnavailable, match="away"):
        check(damaged)


def test_another_format_version_is_refused_and_not_called_damage(damaged):
    _edit_json(damaged / "targets/manifest.json", format_version=99)
    with pytest.raises(UserError, match="format version 99"):
        check(damaged)


def test_a_record_is_read_back_as_it_was_built(whole):
    store = open_store(whole / "targets")
    for shard, record in TargetStore.open(store).commits.items():
        assert CommitRecord.load(store, f"commits/{shard:06d}.json") == record


def test_a_report_of_an_extraction_that_is_too_large_to_be_one_is_a_finding(damaged: Path) -> None:
    with (damaged / "targets/reports/extraction.json").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    (finding,) = check(damaged).findings
    assert (finding.part, finding.file) == ("-", "reports/extraction.json")
    assert f"has {MAX_BYTES + 1} bytes" in finding.found
