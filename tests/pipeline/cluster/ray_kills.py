"""`cdp extract-teacher` with a Ray cluster of its own, whose driver, actors or whole cluster are killed (SIGKILL)."""

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.extraction.report import ExtractionReport
from storage.integrity.verify import verify
from tests.pipeline.crash_points import Snapshot, assert_complete_or_absent, difference, snapshot_of
from tests.pipeline.processes import start_cdp
from tests.processes import is_alive, wait_until_dead

PATIENCE_S = 900
ENDS_BY_ITSELF_S = 120
"""Within this time all processes should notice that their driver is gone: workers within seconds, Ray's own agents
(measured) after a minute."""


@dataclass
class RayTally:
    """What a campaign did."""

    lives: int = 0
    """Commands that were started."""
    came_through: int = 0
    """Commands that ended by themselves, with exit code 0."""
    kills: Counter[str] = field(default_factory=Counter)
    """What was killed -> how often."""
    driver_killed_at: list[tuple[str, float, int]] = field(default_factory=list)
    """Driver or cluster, seconds after its start, shards stored at that time."""
    failed_tries: int = 0
    """Tries that the reports of commands which came through name; each was in a process that was killed."""
    stores: int = 0
    """Finished stores, each compared byte for byte."""
    orphans: list[str] = field(default_factory=list)
    """Command lines of processes still alive some time after their driver was gone; ended by their number."""


@dataclass
class RayCampaign:
    """A store that commands are killed over, and what it must become."""

    teacher: Path
    samples: Path
    expected: Snapshot
    scratch: Path
    seed: int
    tally: RayTally = field(default_factory=RayTally)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._drivers: list[int] = []
        self._new_store()

    def run(self, ends: Sequence[str], actor_kills: int) -> RayTally:
        """Commands one after the other, the last undisturbed.

        Args:
            ends: how each is ended if it has not come through before: "driver" alone, whose workers may go on while
                the next command starts, or its whole "cluster".
            actor_kills: workers killed in each.

        Raises:
            AssertionError: something is neither complete nor absent after a kill, a command fails for another reason
                than our kill, or a finished store is not byte for byte an undisturbed one.
        """
        try:
            for number, end in enumerate(ends):
                if self._life(end, self._stored + number % 3, actor_kills):
                    self._compare()
            assert self._life(None, 0, 0)
            self._compare(new=False)
            assert not verify(self.store, self.samples).findings
        finally:
            self._end_orphans()
        return self.tally

    @property
    def _stored(self) -> int:
        return len(list((self.store / "commits").glob("0*.json")))

    def _life(self, end: str | None, at: int, actor_kills: int) -> bool:
        """One command, ended a random moment after that many shards are stored and workers start; whether not."""
        self.tally.lives += 1
        err = self.scratch / "err.txt"
        places = ("--teacher", self.teacher, "--samples", self.samples, "--targets", self.store, "--workers", 2)
        settings = ("--set", "teacher.batch_size=4", "--set", "extract.max_attempts=50")
        driver = start_cdp("extract-teacher", *places, *settings, err=err)
        self._drivers.append(driver.pid)
        started = time.monotonic()
        killed: set[int] = set()
        next_kill = 0.0
        ends_at = float("inf")
        while driver.poll() is None:
            now = time.monotonic() - started
            assert now < PATIENCE_S, f"the command takes longer than {PATIENCE_S} s"
            if ends_at == float("inf") and self._stored >= at and self._actors(driver.pid, set()):
                ends_at = now + self._rng.uniform(0, 2)
            if end is not None and now > ends_at and len(killed) >= actor_kills:
                self._kill_driver(driver, end, now)
                assert_complete_or_absent(snapshot_of(str(self.store)), self.expected)
                return False
            if len(killed) < actor_kills and now > next_kill and (actors := self._actors(driver.pid, killed)):
                victim = self._rng.choice(actors)
                _kill(victim)
                killed.add(victim)
                self.tally.kills["actor"] += 1
                next_kill = now + self._rng.uniform(0.5, 3)
            time.sleep(0.01)
        assert driver.returncode == 0, err.read_text()
        self.tally.came_through += 1
        self._check_report(killed)
        return True

    def _kill_driver(self, driver: "subprocess.Popen[bytes]", end: str, now: float) -> None:
        members = _started_by(driver.pid) if end == "cluster" else []
        for pid in [driver.pid, *members]:
            _kill(pid)
        driver.wait()
        assert all(wait_until_dead(pid) for pid in members)
        self.tally.kills[end] += 1
        self.tally.driver_killed_at.append((end, round(now, 1), self._stored))

    def _actors(self, driver: int, but: set[int]) -> list[int]:
        found = []
        for pid in _started_by(driver):
            try:
                if b"_Actor" in Path(f"/proc/{pid}/cmdline").read_bytes() and pid not in but and is_alive(pid):
                    found.append(pid)
            except (FileNotFoundError, ProcessLookupError):
                continue
        return sorted(found)

    def _check_report(self, killed: set[int]) -> None:
        """No try failed but in a process that we killed, and none was given up."""
        report = ExtractionReport.model_validate_json((self.store / "reports/extraction.json").read_text())
        assert report.failures == {}
        tries = [one for tries in report.failed_tries.values() for one in tries]
        assert {one.pid for one in tries} <= killed, f"tries failed in {tries}, we killed {killed}"
        assert all("its worker process died" in one.why for one in tries)
        self.tally.failed_tries += len(tries)

    def _compare(self, *, new: bool = True) -> None:
        found = snapshot_of(str(self.store))
        assert found == self.expected, f"seed {self.seed}: {difference(found, self.expected)}"
        self.tally.stores += 1
        if new:
            self._new_store()

    def _new_store(self) -> None:
        self.store = self.scratch / f"store-{self.seed}-{self.tally.stores}"

    def _end_orphans(self) -> None:
        deadline = time.monotonic() + ENDS_BY_ITSELF_S
        while (left := [pid for one in self._drivers for pid in _started_by(one)]) and time.monotonic() < deadline:
            time.sleep(0.2)
        for pid in left:
            self.tally.orphans.append(_command_line(pid))
            _kill(pid)


def _started_by(driver: int) -> list[int]:
    """Living processes of the driver and all it started: a Unix session, which nothing else can be in."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == driver and fields[0] not in "ZX":
            found.append(int(entry.name))
    return found


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()[:200]
    except (FileNotFoundError, ProcessLookupError):
        return "ended meanwhile"


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
