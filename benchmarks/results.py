"""What every results file says of itself: hardware, date, versions, command."""

import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import transformers

RESULTS = Path(__file__).parent / "results"
_Measured = TypeVar("_Measured")


class Spent(NamedTuple):
    """What a step took."""

    wall_s: float
    cpu_s: float
    """Of all cores and threads of this process: what a machine shared with other work changes little."""


def spent(step: Callable[[], object]) -> Spent:
    """Run the step once."""
    wall, processor = time.perf_counter(), time.process_time()
    step()
    return Spent(time.perf_counter() - wall, time.process_time() - processor)


def hardware(device: torch.device) -> str:
    """The machine in one line."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    return f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} used"


def save_result(path: Path, device: torch.device, command: Sequence[str], result: Mapping[str, Any]) -> None:
    """Writes the figures with all that is needed to judge them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "command": " ".join(command),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": hardware(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    path.write_text(json.dumps({**about, **result}, indent=1) + "\n")


def interleaved(ways: Mapping[str, Callable[[], _Measured]], repeats: int) -> dict[str, list[_Measured]]:
    """What each way measures, taken in turns, so that a slow minute of the machine hits all of them alike."""
    found: dict[str, list[_Measured]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, measure in ways.items():
            found[name].append(measure())
    return found


def median_ratio(seconds: Sequence[float], of: Sequence[float]) -> float:
    """Median over repetitions of the ratio within a repetition."""
    return statistics.median(a / b for a, b in zip(seconds, of, strict=True))


def command_line(module: str) -> list[str]:
    """The command as typed, but for where its results went: `--out` with this machine's path."""
    typed = sys.argv[1:]
    while "--out" in typed:
        place = typed.index("--out")
        typed = typed[:place] + typed[place + 2 :]
    return ["python", "-m", module, *typed]


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()
