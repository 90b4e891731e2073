"""Attempts on one target until a time is over; what shows a fault is kept."""

import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase

from tests.fuzz.attempt import Fault, Mutant, Target, attempt

BATCH = 50
"""Mutants of one seed; between two batches the time is looked at."""


@dataclass
class Outcome:
    """What the attempts on one target came to."""

    num_attempts: int = 0
    num_accepted: int = 0
    faults: dict[str, Path] = field(default_factory=dict)
    """Kind -> the folder that shows it."""


def fuzz(target: Target, seconds: float, seed: int, keep: Path, report: Callable[[Outcome], None]) -> Outcome:
    """Attempts until the time is over; the first input of each kind of fault is kept in a folder below `keep`."""
    outcome, end = Outcome(), time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="fuzz-") as work:
        clean, copy = Path(work) / "sound", Path(work) / "spoiled"
        target.make(clean)
        shutil.copytree(clean, copy)
        sound = target.read(copy)

        def once(mutant: Mutant) -> None:
            if time.monotonic() > end:
                return
            shutil.rmtree(copy)
            shutil.copytree(clean, copy)
            mutant(copy)
            accepted, fault = attempt(target, copy, sound)
            outcome.num_attempts += 1
            outcome.num_accepted += accepted
            if fault is not None and fault.kind not in outcome.faults:
                outcome.faults[fault.kind] = _kept(target, copy, fault, keep)
                print(f"FAULT {target.name}: {fault.kind}: {outcome.faults[fault.kind]}", flush=True)

        # Hypothesis draws the mutants, without its shrinking: they are small changes, and the time is short.
        mutants, batch = target.mutants(clean), 0
        while time.monotonic() < end:
            test = hypothesis.given(mutants)(once)
            test = hypothesis.settings(
                max_examples=BATCH,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )(test)
            hypothesis.seed(zlib.crc32(f"{target.name} {seed} {batch}".encode()))(test)()
            batch += 1
            report(outcome)
    return outcome


def _kept(target: Target, copy: Path, fault: Fault, keep: Path) -> Path:
    """A copy of the input, with the command that tries it again and what happened."""
    name = "".join(char if char.isalnum() else "-" for char in f"{target.name} {fault.kind}")[:80]
    keep.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=keep))
    shutil.copytree(copy, folder / "input", symlinks=True)
    command = f'python -m tests.fuzz --target "{target.name}" --replay {folder / "input"}'
    (folder / "fault.txt").write_text(f"{command}\n\n{fault.kind}\n{fault.detail}\n", errors="backslashreplace")
    return folder
