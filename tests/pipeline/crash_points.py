"""Extraction in processes that die by SIGKILL before a chosen storage operation, or at a random moment. Without Ray.

A process loads the libraries once and forks a child for each life, so that a life costs about a second. What a life
runs is `pipeline.extraction.extract`, its tasks in this process instead of in actors.
"""

import contextlib
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import torch

import stages.teacher.teacher
from pipeline.extraction.extract import extract
from pipeline.extraction.report import RUN_FILE
from pipeline.run_file import RunFile, save_run_file
from stages.samples.pack import PackConfig, pack_samples
from stages.teacher.config import TeacherConfig
from stages.teacher.teacher import Teacher, load_teacher
from storage.integrity.verify import verify
from storage.stores import PARTIAL, open_store
from storage.stores.cache import cache_dir
from tests.checkpoints import make_llava_data, make_tiny_llava
from tests.pipeline.forks import PATIENCE_S, Ended, Forked
from tests.pipeline.in_process import without_ray

MOST_LIVES = 100
PARTS = ("manifest", "teacher", "shards", "commits", "reports", "abandoned")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT

Snapshot = dict[str, str]
"""Path -> sha256 of its bytes ("folder" for a folder, nothing for a report, which holds times)."""


@dataclass(frozen=True)
class World:
    """What is extracted, by whom."""

    teacher: Teacher
    samples: str

    @classmethod
    def load(cls, checkpoint: Path, samples: Path) -> Self:
        """With the teacher in memory, which is not what is tried here."""
        torch.set_num_threads(1)
        return cls(load_teacher(TeacherConfig(checkpoint=str(checkpoint), batch_size=4)), str(samples))

    def extract(self, targets: str, threads: int = 1) -> None:
        """The command, its tasks in this process."""
        with (
            without_ray(threads),
            patch.object(stages.teacher.teacher, "load_teacher", lambda *_: self.teacher),
        ):
            settings = self.teacher.identity.settings
            run = RunFile(teacher=settings, samples=self.samples, targets=targets)
            extract(
                settings, self.samples, targets, run.extract, on_begin=lambda store: save_run_file(run, store, RUN_FILE)
            )


class Countdown:
    """Kills this process before its n-th operation that changes a store, and says which operation that was."""

    def __init__(self, at: int | None, folders: tuple[str, ...], staged: bool, say: Callable[[str], None]) -> None:
        self.at, self.folders, self.staged, self.say = at, folders, staged, say
        self.count = 0
        self._lock = threading.Lock()

    def install(self) -> None:
        """Watches this process from now on; there is no way back."""
        sys.addaudithook(self._audit)
        fsync = os.fsync

        def counted(fd: Any) -> None:
            self.operation("fsync", str(Path(f"/proc/self/fd/{fd}").readlink()))
            fsync(fd)

        os.fsync = counted
        with contextlib.suppress(ImportError):
            import obstore

            for name in ("put", "delete", "copy"):
                setattr(obstore, name, self._watched(name, getattr(obstore, name)))

    def operation(self, kind: str, path: str) -> None:
        """About to happen."""
        if not self.staged and f"{PARTIAL}/" in path:
            return
        with self._lock:
            self.count += 1
            if self.count == self.at:
                self.say(f"{kind} {self._place(path)}")
                os.kill(os.getpid(), signal.SIGKILL)
                # The signal reaches this thread at the latest when it wants to go on.
                time.sleep(PATIENCE_S)

    def _watched(self, name: str, function: Any) -> Any:
        def call(client: Any, where: Any, *rest: Any, **options: Any) -> Any:
            first = where if isinstance(where, str) else where[0]
            self.operation(f"object {name}", first)
            return function(client, where, *rest, **options)

        return call

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | Path) and flags is not None and flags & WRITES:
                self._in_store("open", str(path))
        elif event in ("os.rename", "os.link"):
            self._in_store(event.removeprefix("os."), str(arguments[0]))
        elif event in ("os.mkdir", "os.rmdir", "os.remove"):
            path, folder = os.fsdecode(arguments[0]), arguments[-1]
            if folder not in (-1, None):
                # As shutil.rmtree does it, so that the name alone says nothing.
                path = str(Path(f"/proc/self/fd/{folder}").readlink() / path)
            self._in_store(event.removeprefix("os."), path)

    def _in_store(self, kind: str, path: str) -> None:
        if path.startswith(self.folders):
            self.operation(kind, path)

    def _place(self, path: str) -> str:
        """Without what differs from run to run."""
        parts = [part.split(".")[0] for part in path.split("/")]
        top = next((name for name in PARTS if name in parts), "store")
        return f"{top}, staged" if PARTIAL in path else top


@dataclass(frozen=True)
class Place:
    """A world and the store that is made of it, killed again and again."""

    world: World
    targets: str

    def start(self, at: int | None = None, *, staged: bool = True, threads: int = 1) -> Forked:
        """One life of the command, that ends before its operation `at`; its result is how many it did."""

        def run(say: Callable[[str], None]) -> int:
            countdown = Countdown(at, (self.targets, str(cache_dir() / "staging")), staged, say)
            countdown.install()
            self.world.extract(self.targets, threads)
            return countdown.count

        return Forked(run)

    def live(self, at: int | None = None, *, staged: bool = True) -> Ended:
        """One life to its end."""
        return self.start(at, staged=staged).end()

    def finish(self) -> Snapshot:
        """An undisturbed life, and what is there afterwards."""
        assert not self.live().killed
        return self.snapshot()

    def snapshot(self) -> Snapshot:
        """All that lies in the store and in the staging folder of an object store, `.partial` included."""
        return dict(Forked(lambda _: snapshot_of(self.targets)).end().result)

    def check(self) -> None:
        """Every byte is what was committed."""
        findings = Forked(lambda _: [str(one) for one in verify(self.targets, self.world.samples).findings]).end()
        assert findings.result == []

    def clear(self) -> None:
        """An empty store."""
        Forked(lambda _: _clear(self.targets)).end()


def snapshot_of(targets: str) -> Snapshot:
    """All that lies in a store, folders and `.partial` ones included, and in the staging folder of an object store."""
    store = open_store(targets)
    if "://" in targets:
        found = {path: sha256(store.read(path)).hexdigest() for path in store.list()}
        left = (cache_dir() / "staging").rglob("*")
        found |= {f"staging/{path.name}": "folder" for path in left if PARTIAL in path.name}
    else:
        root = Path(targets)
        found = {
            path.relative_to(root).as_posix(): "folder" if path.is_dir() else sha256(path.read_bytes()).hexdigest()
            for path in root.rglob("*")
        }
    return {path: "" if path.startswith("reports/") else digest for path, digest in found.items()}


def _clear(targets: str) -> None:
    store = open_store(targets)
    if "://" not in targets:
        shutil.rmtree(targets, ignore_errors=True)
        return
    for top in {path.split("/")[0] for path in store.list()} - {"manifest.json"}:
        store.remove_tree(top)
    store.move("manifest.json", "cleared/manifest.json")
    store.remove_tree("cleared")


def assert_complete_or_absent(found: Snapshot, expected: Snapshot) -> None:
    """After a kill: what has a final name has its final bytes, and what is committed is all there."""
    lasting = {path: digest for path, digest in found.items() if PARTIAL not in path}
    wrong = [path for path, digest in lasting.items() if expected.get(path) != digest]
    assert not wrong, f"not as in an undisturbed store: {wrong[:5]}"
    for record in [path for path in lasting if path.startswith("commits/") and path.endswith(".json")]:
        name = record.removeprefix("commits/").removesuffix(".json")
        folder = "teacher/" if name == "teacher" else f"shards/{name}-"
        lost = [path for path in expected if path.startswith(folder) and path not in lasting]
        assert not lost, f"{record} is there without {lost[:5]}"


@dataclass
class Tally:
    """What a campaign did."""

    lives_killed: int = 0
    undisturbed_lives: int = 0
    operations: int = 0
    """Of an undisturbed life; 0 if they were not counted."""
    died_before: Counter[str] = field(default_factory=Counter)
    """Operation -> lives that ended before it."""

    def add(self, ended: Ended) -> None:
        """One life."""
        if ended.killed:
            self.lives_killed += 1
            self.died_before[ended.said or "no operation: at a moment"] += 1
        else:
            self.undisturbed_lives += 1


def at_every_operation(place: Place, *, staged: bool, stride: int = 1, after: int | None = None) -> Tally:
    """For each n: a store whose first life ended before its n-th operation, finished by the same command.

    Args:
        place: where; cleared each time.
        staged: also before operations inside a staging folder; else only before those that others can see.
        stride: every how many-th operation.
        after: each first life is preceded by one that ended before this operation, so that cleaning is hit, too.

    Raises:
        AssertionError: after a kill something is neither complete nor absent, or a finished store is not byte for
            byte that of an undisturbed life.
    """
    tally = Tally()
    place.clear()
    expected = place.finish()
    place.check()
    at = 1
    while True:
        place.clear()
        if after is not None:
            tally.add(place.live(after))
        ended = place.live(at, staged=staged)
        tally.add(ended)
        if not ended.killed:
            tally.operations = ended.result
            return tally
        assert_complete_or_absent(place.snapshot(), expected)
        found = place.finish()
        assert found == expected, f"killed before operation {at} ({ended.said}): {difference(found, expected)}"
        tally.undisturbed_lives += 1
        at += stride


def at_random_operations(place: Place, seed: int, num_stores: int) -> Tally:
    """Stores made by lives that each end before a random operation, until one comes through."""
    tally = Tally()
    place.clear()
    expected = place.finish()
    operations = place_operations(place)
    rng = random.Random(seed)
    for _ in range(num_stores):
        place.clear()
        while (ended := place.live(rng.randint(1, operations // 3))).killed:
            tally.add(ended)
            assert_complete_or_absent(place.snapshot(), expected)
            assert tally.lives_killed < MOST_LIVES * num_stores, "lives make no progress"
        found = place.finish()
        assert found == expected, f"seed {seed}: {difference(found, expected)}"
        tally.undisturbed_lives += 2
    return tally


def place_operations(place: Place) -> int:
    """How many operations an undisturbed life of an empty store does."""
    place.clear()
    return int(place.live().result)


def at_random_moments(place: Place, seed: int, num_kills: int, side_by_side: int = 2) -> Tally:
    """Several commands at once in one store, two threads each, all killed at moments of their own, again and again.

    Whenever one comes through, the store is compared and made anew.
    """
    tally = Tally()
    place.clear()
    expected = place.finish()
    place.clear()
    started = time.monotonic()
    assert not place.live().killed
    whole_s = time.monotonic() - started
    place.clear()
    rng = random.Random(seed)
    while tally.lives_killed < num_kills:
        lives = [place.start(threads=2) for _ in range(side_by_side)]
        born = time.monotonic()
        for life, seconds in zip(lives, sorted(rng.uniform(0, whole_s) for _ in lives), strict=True):
            life.kill_after(max(0.0, born + seconds - time.monotonic()))
        ended = [life.end() for life in lives]
        for one in ended:
            tally.add(one)
        if all(one.killed for one in ended):
            assert_complete_or_absent(place.snapshot(), expected)
            continue
        found = place.finish()
        assert found == expected, f"seed {seed}: {difference(found, expected)}"
        tally.undisturbed_lives += 1
        place.clear()
    found = place.finish()
    assert found == expected, f"seed {seed}: {difference(found, expected)}"
    place.check()
    return tally


def difference(found: Snapshot, expected: Snapshot) -> str:
    """What an assertion says when two stores are not the same."""
    more, fewer = sorted(found.keys() - expected.keys()), sorted(expected.keys() - found.keys())
    other = sorted(path for path in found.keys() & expected.keys() if found[path] != expected[path])
    return f"left over {more[:5]}, missing {fewer[:5]}, other bytes {other[:5]}"


def make_world(folder: Path, num_shards: int = 2) -> World:
    """Shards of three samples and a teacher of six layers."""
    teacher = make_tiny_llava(folder / "teacher")
    data, images = make_llava_data(folder / "data", 3 * num_shards)
    pack_samples(data, images, folder / "samples", PackConfig(max_samples_per_shard=3))
    return World.load(teacher, folder / "samples")
