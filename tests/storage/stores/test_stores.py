"""Both stores keep the same protocol; S3 is moto's server on loopback."""

import multiprocessing
import pickle
from pathlib import Path
from stat import S_IMODE

import pytest
import torch
from safetensors.torch import save_file

from storage.digests import file_sha256
from storage.errors import CorruptData, UserError
from storage.stores import LocalStore, ObjectStore, Store, open_store, relative_path
from tests.storage.builders import as_a_dead_process


@pytest.fixture(params=["folder", "memory", "s3"])
def store(request, tmp_path, monkeypatch) -> Store:
    monkeypatch.setenv("CDP_CACHE_DIR", str(tmp_path / "cache"))
    if request.param == "folder":
        return open_store(tmp_path / "store")
    if request.param == "memory":
        return open_store(f"memory://{tmp_path.name}/some/prefix")
    return open_store(f"{request.getfixturevalue('s3_bucket')}/{tmp_path.name}")


def test_what_is_written_is_read_listed_and_replaced(store):
    assert store.list() == []
    assert not store.exists("a/b.json")
    with pytest.raises(FileNotFoundError):
        store.read("a/b.json")
    store.write("a/b.json", b"old")
    store.write("a/b.json", b"new")
    store.write("ab.json", b"")
    assert store.read("a/b.json") == b"new"
    assert store.read("ab.json") == b""
    assert store.exists("a/b.json")
    assert store.list() == ["a/b.json", "ab.json"]
    assert store.list("a") == ["a/b.json"]
    assert store.list("nothing") == []


def test_create_is_exclusive(store):
    assert store.create("commits/0.json", b"first") is True
    assert store.create("commits/0.json", b"second") is False
    assert store.create("commits/0.json", b"first") is True
    assert store.read("commits/0.json") == b"first"
    assert store.list() == ["commits/0.json"]


def test_a_tree_is_put_fetched_and_removed(store):
    staged = store.staging("shards/x")
    (staged / "in").mkdir()
    (staged / "in/one").write_bytes(b"1")
    (staged / "two").write_bytes(b"22")
    expect = {"in/one": (1, file_sha256(staged / "in/one"))}
    store.put_tree(staged, "shards/x")
    assert not staged.exists()
    assert store.list() == ["shards/x/in/one", "shards/x/two"]
    folder = store.local("shards/x", expect)
    assert (folder / "in/one").read_bytes() == b"1"
    assert store.local("shards/x") == folder
    assert store.local("shards/x/two").read_bytes() == b"22"
    store.remove_tree("shards/x")
    store.remove_tree("shards/x")
    assert store.list() == []
    with pytest.raises(FileNotFoundError):
        store.local("shards/x")


def test_putting_a_tree_twice_leaves_the_last_content(store):
    for content in (b"a", b"a", b"other"):
        staged = store.staging("shards/x")
        (staged / "file").write_bytes(content)
        store.put_tree(staged, "shards/x")
    assert store.read("shards/x/file") == b"other"
    assert store.list() == ["shards/x/file"]


def test_a_folder_in_place_stays_whole_when_its_equal_cannot_be_removed(tmp_path, monkeypatch):
    store = LocalStore(tmp_path)
    names = ("a", "b", "c")

    def staged():
        folder = store.staging("shards/x")
        for name in names:
            (folder / name).write_bytes(name.encode())
        return folder

    def half_removed(folder):
        (folder / "a").unlink()
        raise FileNotFoundError(folder / "b")

    store.put_tree(staged(), "shards/x")
    with monkeypatch.context() as patched:
        patched.setattr("storage.stores.local.shutil.rmtree", half_removed)
        with pytest.raises(FileNotFoundError):
            store.put_tree(staged(), "shards/x")
    assert {name: store.read(f"shards/x/{name}") for name in names} == {name: name.encode() for name in names}


@pytest.mark.parametrize(("folder", "file"), [(0o755, 0o644), (0o750, 0o640), (0o700, 0o600)])
def test_who_may_look_into_a_folder_may_read_weights_in_it(folder: int, file: int, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    staged = store.staging("student")
    save_file({"weight": torch.ones(1)}, staged / "model.safetensors")
    staged.chmod(folder)
    store.put_tree(staged, "student")
    assert S_IMODE(store.local("student/model.safetensors").stat().st_mode) == file


def test_folders_are_named_without_what_is_in_them(store):
    assert store.folders("shards") == []
    for path in ("shards/b/in/one", "shards/a/two", "shards/file", "other/c/three"):
        store.write(path, b"1")
    store.staging("shards/d")
    assert store.folders("shards") == ["shards/a", "shards/b"]


def test_partials_are_looked_for_everywhere_but_in_folders_known_to_be_whole(tmp_path):
    store = open_store(tmp_path)
    with as_a_dead_process():
        for name in ("root", "quarantine/1/findings.json", "shards/a.zarr", "shards/a.zarr/inside"):
            store.staging(name)
    assert store.remove_partials(lambda folder: folder == "shards/a.zarr") == 3
    assert store.remove_partials() == 1


def test_partials_are_invisible_and_only_those_of_dead_processes_are_removed(store):
    with as_a_dead_process():
        left_over = store.staging("shards/x")
    (left_over / "file").write_bytes(b"half")
    in_work = store.staging("shards/x")
    assert store.list() == []
    assert store.remove_partials() == 1
    assert not left_over.exists()
    assert in_work.exists()
    assert store.remove_partials() == 0


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../b", "a//b", "./a", "a\\b", "a\nb", "a/"])
def test_paths_that_leave_the_store_are_refused(store, path):
    for action in (store.read, store.exists, store.local, lambda p: store.write(p, b""), store.remove_tree):
        with pytest.raises(ValueError, match="does not stay inside"):
            action(path)
    with pytest.raises(ValueError, match="does not stay inside"):
        relative_path(path)


def test_a_store_reopens_by_its_url_and_travels_as_an_address(store):
    store.write("x", b"1")
    assert open_store(store.url).read("x") == b"1"
    assert pickle.loads(pickle.dumps(store)).read("x") == b"1"


def test_a_damaged_download_is_refused_and_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("CDP_CACHE_DIR", str(tmp_path / "cache"))
    store = open_store("memory://damaged")
    store.write("tar", b"abc")
    with pytest.raises(CorruptData, match="arrived with 3 bytes"):
        store.local("tar", {"": (3, "0" * 64)})
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size] == []
    assert store.local("tar").read_bytes() == b"abc"


def test_a_replaced_object_is_downloaded_again(tmp_path, monkeypatch):
    monkeypatch.setenv("CDP_CACHE_DIR", str(tmp_path / "cache"))
    store = open_store("memory://replaced")
    store.write("tar", b"abc")
    assert store.local("tar").read_bytes() == b"abc"
    store.write("tar", b"xyz")
    assert store.local("tar").read_bytes() == b"xyz"


def test_a_failed_write_leaves_the_old_bytes_and_no_partial(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    store.write("x", b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        store.write("x", b"new")
    assert store.read("x") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_unknown_schemes_are_refused():
    assert isinstance(open_store("file:///tmp/x"), LocalStore)
    assert isinstance(open_store("s3://bucket/x"), ObjectStore)
    for url in ("http://host/x", "pipe://rm", "ftp://x"):
        with pytest.raises(UserError, match="scheme"):
            open_store(url)


def _read_in_child(store: Store, answers: "multiprocessing.Queue[str]") -> None:
    try:
        store.read("x")
    except UserError as error:
        answers.put(str(error))


def test_an_object_store_used_before_a_fork_is_an_error_and_not_a_hang():
    store = open_store("memory://forked")
    store.write("x", b"1")
    context = multiprocessing.get_context("fork")
    answers: multiprocessing.Queue[str] = context.Queue()
    child = context.Process(target=_read_in_child, args=(store, answers))
    child.start()
    assert "spawn" in answers.get(timeout=20)
    child.join(20)
    assert child.exitcode == 0


def test_the_home_folder_of_nobody_is_refused_by_its_name():
    with pytest.raises(UserError, match=r"~nobody_here/x begins with the home folder of an unknown user"):
        open_store("~nobody_here/x")
