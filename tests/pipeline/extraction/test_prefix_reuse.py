"""Which way a store is made: as it was begun, unless the settings say how it must be."""

from pathlib import Path

import pytest

from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.extract import as_begun, extract
from stages.teacher.config import PrefixReuse, TeacherConfig
from storage.errors import FingerprintMismatch
from storage.stores import open_store
from storage.targets.store import TargetStore
from tests.conftest import TinyWorld
from tests.pipeline.in_process import without_ray
from tests.pipeline.processes import tree

LASTING = ("manifest.json", "teacher/", "shards/", "commits/")


def run(tiny: TinyWorld, store: Path, way: PrefixReuse) -> None:
    teacher = TeacherConfig(checkpoint=str(tiny.teacher), batch_size=4, prefix_reuse=way)
    with without_ray():
        extract(teacher, str(tiny.samples), str(store), ExtractConfig())


def test_a_store_goes_on_as_it_was_begun_and_another_way_is_refused(
    tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    run(tiny, store, "off")
    assert b"prefix_reuse" not in (store / "manifest.json").read_bytes(), "as before there was another way"
    assert b'"prefix_reuse":true' in (targets / "manifest.json").read_bytes(), "the default of a new store"
    expected = tree(store, *LASTING)
    lost = sorted((store / "commits").iterdir())[0]
    lost.unlink()
    run(tiny, store, "auto")
    assert tree(store, *LASTING) == expected
    with pytest.raises(FingerprintMismatch, match=r"prefix_reuse: stored \(absent\), this run true"):
        run(tiny, store, "on")
    with pytest.raises(FingerprintMismatch, match=r"prefix_reuse: stored true, this run \(absent\)"):
        run(tiny, targets, "off")
    assert tree(store, *LASTING) == expected


def test_only_auto_looks_at_what_was_begun(tiny: TinyWorld, targets: Path, tmp_path: Path) -> None:
    auto = TeacherConfig(checkpoint=str(tiny.teacher))
    assert as_begun(auto, open_store(targets)).prefix_reuse == "on"
    assert as_begun(auto, open_store(tmp_path / "new")) == auto
    off = auto.model_copy(update={"prefix_reuse": "off"})
    assert as_begun(off, open_store(targets)) == off
    assert TargetStore.open(targets).manifest.fingerprint.prefix_reuse
