"""Every number of every record and manifest is compared with the data, or has a range: none is believed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from storage.codecs.codec_settings import LogitCodecConfig, MapCodecConfig
from storage.errors import UserError
from storage.integrity.verify import verify
from storage.samples.index import SampleShardEntry
from storage.stores import open_store
from storage.targets.commits import CommitRecord
from storage.targets.manifest import Fingerprint, Manifest
from storage.targets.store import TargetStore
from storage.targets.teacher_assets import TeacherRecord, save_teacher
from tests.storage.builders import extract, pack
from tests.storage.integrity.forging import Leaf, documents, forge, number_leaves, value_at

TEACHER_CONFIG = {"text_config": {"num_hidden_layers": 6, "hidden_size": 16, "vocab_size": 50}}
SETTINGS = ("fingerprint", "logit_codec")
UNTOLD: dict[Leaf, str] = {
    ("fingerprint", "capture_version"): "an extraction compares it with its own",
    ("fingerprint", "max_length"): "a longer limit fits shorter samples",
    ("fingerprint", "map_codec", "cap_factor"): "decoding does not use it",
    ("fingerprint", "map_codec", "sqrt8_below"): "it counts for `auto` alone, and for maps whose size lies between",
    (*SETTINGS, "num_levels"): "a record has room for some levels more",
    (*SETTINGS, "temperatures", 0): "of a tail's sum nothing says at which temperature it was taken",
}
"""Settings of which a value nearby is as good as the one that was written, and why; they have a range."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shard of five samples with maps of two sizes, one of them skipped; a teacher of one file."""
    root = tmp_path_factory.mktemp("whole")
    samples, store = pack(root / "samples", (6,)), open_store(root / "targets")
    extract(samples, store, skip=("s0-5",), teacher_config=TEACHER_CONFIG)
    staged = store.staging("teacher")
    (staged / "config.json").write_text("{}")
    save_teacher(store, Manifest.load(store), staged)
    # Found without: the manifest's number of shards is compared with the samples.
    assert verify(root / "targets", root / "samples").ok
    return root


def is_found(root: Path) -> bool:
    """Whether the store is not opened, or verify has a finding."""
    try:
        TargetStore.open(root / "targets")
        return not verify(root / "targets", root / "samples").ok
    except UserError:
        return True


def _leaves_of(model: type[BaseModel], *way: str) -> set[Leaf]:
    return {(*way, name) for name, field in model.model_fields.items() if field.annotation in (int, float)}


FILES: Leaf = ("files", "zarr.json", 0)
ENTRY = {name for name, kind in SampleShardEntry.__annotations__.items() if "int" in str(kind)}
REPEATED = ("shard", "num_samples", "num_tokens", "num_answer_rows", "num_maps", "num_map_references")
LEAVES: dict[str, set[Leaf]] = {
    "manifest": {
        *_leaves_of(Manifest),
        # A store of maps of tokens by a teacher in one process, as this one, does not have them.
        *(_leaves_of(Fingerprint, "fingerprint") - {("fingerprint", name) for name in ("map_pooling", "tensor_ranks")}),
        *_leaves_of(MapCodecConfig, "fingerprint", "map_codec"),
        *(leaf for leaf in _leaves_of(LogitCodecConfig, *SETTINGS) if leaf[-1] != "num_tail_samples"),
        (*SETTINGS, "num_draws"),
        (*SETTINGS, "temperatures", 0),
        *(("fingerprint", "layers", row) for row in range(3)),
        *(("fingerprint", "windows", window, row) for window in range(2) for row in range(2)),
    },
    "record": {*_leaves_of(CommitRecord), FILES},
    "teacher": {*_leaves_of(TeacherRecord), ("files", "config.json", 0)},
    "group": {("zarr_format",), *(("attributes", "compodistill", name) for name in REPEATED)},
    "index": {("format_version",), *(("shards", 0, name) for name in ENTRY)},
    "table": {("format_version",), ("members", 1, 1, 0, 0), ("members", 1, 1, 1, 1), ("members", 1, 2)},
}
"""The numbers of each document; of many alike one."""
CASES = [
    pytest.param(name, leaf, id=".".join(map(str, (name, *leaf))))
    for name, leaves in LEAVES.items()
    for leaf in sorted(leaves, key=str)
]


def test_no_number_of_any_document_is_left_out(whole: Path) -> None:
    for name, path in documents(whole).items():
        found = {_one_of_many(leaf) for leaf in number_leaves(json.loads(path.read_bytes()))}
        assert {leaf for leaf in found if leaf[1:2] != ("teacher_config",) and leaf[1:2] != ("processor",)} == {
            _one_of_many(leaf) for leaf in LEAVES[name]
        }, name


def _one_of_many(leaf: Leaf) -> Leaf:
    """Of files, and of samples in a table, the way without a name or a number."""
    many = {"files": (1,), "members": (1, 3, 4)}.get(str(leaf[0]), ())
    return tuple("*" if position in many else key for position, key in enumerate(leaf))


@pytest.mark.parametrize(("name", "leaf"), CASES)
def test_a_forged_number_is_found_with_every_digest_right(name: str, leaf: Leaf, whole: Path, tmp_path: Path) -> None:
    true: Any = value_at(json.loads(documents(whole)[name].read_bytes()), leaf)
    near = () if name == "manifest" and leaf in UNTOLD else (true + 1,)
    for number, forged in enumerate((*near, -1, 2**80)):
        root = tmp_path / str(number)
        shutil.copytree(whole, root)
        forge(root, name, leaf, forged)
        assert is_found(root), forged


def test_a_limit_of_tokens_below_the_longest_sample_is_found(whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "forged"
    shutil.copytree(whole, root)
    forge(root, "manifest", ("fingerprint", "max_length"), 1)
    (finding,) = {finding.part: finding for finding in verify(root / "targets").findings}.values()
    assert "at most max_length, 1" in finding.found


def test_counts_that_no_array_holds_are_found_by_readers_too(whole: Path, tmp_path: Path) -> None:
    for name in ("num_map_tokens", "num_map_squares", "num_referenced_tokens", "num_referenced_squares"):
        root = tmp_path / name
        shutil.copytree(whole, root)
        forge(root, "record", (name,), 1)
        with pytest.raises(UserError, match=f"{name} .*1, as the record says"):
            TargetStore.open(root / "targets").shard(0)


def test_a_skipped_sample_that_is_listed_twice_is_found(whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "forged"
    shutil.copytree(whole, root)
    record = json.loads(documents(root)["record"].read_bytes())
    forge(root, "record", ("skipped",), record["skipped"] * 2)
    assert not verify(root / "targets").ok


def test_the_untold_settings_are_settings() -> None:
    assert UNTOLD.keys() <= LEAVES["manifest"]
