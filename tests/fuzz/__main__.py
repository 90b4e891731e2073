"""`python -m tests.fuzz`: spoils what strangers give, for a time, and keeps what no reader may do."""

import argparse
import random
import shutil
import tempfile
import time
import warnings
from pathlib import Path

from tests.fuzz.attempt import Target, attempt
from tests.fuzz.fuzz import Outcome, fuzz
from tests.fuzz.targets import TARGETS

FAULTS = Path("fuzz-faults")
REPORT_S = 10.0


def replay(target: Target, folder: Path) -> int:
    """Reads a kept input again, and says what happens."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as work:
        target.make(Path(work) / "sound")
        sound = target.read(Path(work) / "sound")
        shutil.copytree(folder, Path(work) / "spoiled")
        accepted, fault = attempt(target, Path(work) / "spoiled", sound)
    print(f"{fault.kind}\n{fault.detail}" if fault else "accepted" if accepted else "refused with a named error")
    return int(fault is not None)


def main() -> int:
    """Gives the exit code: 1 with a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600, help="for all targets together")
    parser.add_argument("--target", choices=[target.name for target in TARGETS], help="this one alone")
    parser.add_argument("--seed", type=int, help="another one tries other inputs; drawn and printed if not given")
    parser.add_argument("--keep", type=Path, default=FAULTS, help="folder for the inputs that show a fault")
    parser.add_argument("--replay", type=Path, help="with --target: read this kept input again")
    chosen = parser.parse_args()
    # Libraries warn of much that is spoiled.
    warnings.simplefilter("ignore")
    targets = [target for target in TARGETS if chosen.target in (None, target.name)]
    if chosen.replay is not None:
        if chosen.target is None:
            parser.error("--replay needs --target")
        return replay(targets[0], chosen.replay)
    seed = random.getrandbits(32) if chosen.seed is None else chosen.seed
    print(f"seed {seed}, {chosen.seconds:g} s, {len(targets)} targets", flush=True)
    started, num_faults = time.monotonic(), 0
    for target in targets:
        begun, said = time.monotonic(), [time.monotonic()]

        def report(outcome: Outcome, target: Target = target, begun: float = begun, said: list[float] = said) -> None:
            now = time.monotonic()
            if now - said[0] > REPORT_S:
                said[0] = now
                rate, left = outcome.num_attempts / (now - begun), chosen.seconds - (now - started)
                print(f"{target.name}: {outcome.num_attempts} attempts, {rate:.0f}/s, {left:.0f} s left", flush=True)

        outcome = fuzz(target, chosen.seconds / len(targets), seed, chosen.keep, report)
        num_faults += len(outcome.faults)
        print(
            f"{target.name}: {outcome.num_attempts} attempts, {outcome.num_accepted} accepted, "
            f"{len(outcome.faults)} kinds of faults",
            flush=True,
        )
    return int(num_faults > 0)


if __name__ == "__main__":
    raise SystemExit(main())
