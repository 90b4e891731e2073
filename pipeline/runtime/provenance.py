"""Records what a run was made with: versions, revision of the code, hardware."""

import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_LIBRARIES = ["torch", "transformers", "accelerate", "peft", "safetensors", "zarr", "webdataset", "numpy"]


def provenance() -> dict[str, Any]:
    """Gives versions, revision and hardware as JSON values; without a git checkout both `git_` values are None."""
    revision = _git("rev-parse", "HEAD")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("compodistill", *_LIBRARIES)},
        "git_revision": revision,
        "git_changed": None if revision is None else bool(_git("status", "--porcelain")),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "hardware": {"device": device, "num_gpus": torch.cuda.device_count(), "num_threads": torch.get_num_threads()},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)  # noqa: S603, S607
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
