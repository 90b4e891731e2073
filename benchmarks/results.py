"""What every results file says of itself: hardware, date, versions, command."""

import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"


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


def interleaved(ways: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, taken in turns, so that a slow minute of the machine hits all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, measure in ways.items():
            seconds[name].append(measure())
    return seconds


def median_ratio(seconds: Sequence[float], of: Sequence[float]) -> float:
    """Median over repetitions of the ratio within a repetition."""
    return statistics.median(a / b for a, b in zip(seconds, of, strict=True))


def command_line(module: str) -> list[str]:
    """The command as typed, without this machine's paths."""
    return ["python", "-m", module, *sys.argv[1:]]


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()
