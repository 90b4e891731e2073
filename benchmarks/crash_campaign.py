"""Kills of extraction at every storage operation, at random ones and moments, of Ray's processes, and of training.

After each kill the same command is run again; the campaign ends with an error when a finished store is not byte for
byte that of an undisturbed run, or when something a kill left is neither complete nor absent.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import RESULTS, save_result
from stages.samples.pack import PackConfig, pack_samples
from stages.student.stage_config import STAGES
from tests.checkpoints import make_llava_data, make_tiny_llava
from tests.pipeline.cluster.ray_kills import RayCampaign
from tests.pipeline.crash_points import (
    Place,
    World,
    at_every_operation,
    at_random_moments,
    at_random_operations,
    make_world,
)
from tests.pipeline.training_kills import kill_stages, train_in_fork
from tests.stages.distilled import extract_here, make_tiny_data

SEED = 2026
RANDOM_SHARDS = 5
"""Of the store that is killed over at random; the others have two, which hold every operation there is."""
S3_PORT = 5871
BUCKET = "cdp-crash"


def local_operations(folder: Path, scale: float) -> dict[str, Any]:
    place = Place(make_world(folder), str(folder / "store"))
    return vars(at_every_operation(place, staged=False, stride=_stride(1, scale)))


def staged_operations(folder: Path, scale: float) -> dict[str, Any]:
    place = Place(make_world(folder), str(folder / "store"))
    return vars(at_every_operation(place, staged=True, stride=_stride(13, scale)))


def s3_operations(folder: Path, scale: float) -> dict[str, Any]:
    with _s3_server(folder):
        place = Place(make_world(folder), f"s3://{BUCKET}/targets")
        return vars(at_every_operation(place, staged=False, stride=_stride(3, scale)))


def random_operations(folder: Path, scale: float) -> dict[str, Any]:
    place = Place(make_world(folder, RANDOM_SHARDS), str(folder / "store"))
    return {"seed": SEED, "shards": RANDOM_SHARDS, **vars(at_random_operations(place, SEED, max(1, round(8 * scale))))}


def random_moments(folder: Path, scale: float) -> dict[str, Any]:
    place = Place(make_world(folder, RANDOM_SHARDS), str(folder / "store"))
    return {"seed": SEED, "shards": RANDOM_SHARDS, **vars(at_random_moments(place, SEED, max(1, round(40 * scale))))}


def ray(folder: Path, scale: float) -> dict[str, Any]:
    teacher = make_tiny_llava(folder / "teacher")
    data, images = make_llava_data(folder / "data", 60)
    pack_samples(data, images, folder / "samples", PackConfig(max_samples_per_shard=3))
    undisturbed = Place(World.load(teacher, folder / "samples"), str(folder / "undisturbed")).finish()
    campaign = RayCampaign(teacher, folder / "samples", undisturbed, folder, SEED)
    ends = ["driver", "cluster"] * max(1, round(2.5 * scale))
    return {"seed": SEED, **vars(campaign.run(ends, actor_kills=15))}


def training(folder: Path, scale: float) -> dict[str, Any]:
    """Students, too: each stage killed at random moments."""
    data = make_tiny_data(folder / "data", num_samples=24)
    extract_here(data, folder / "targets", batch_size=4)
    undisturbed = folder / "undisturbed"
    # In a process of its own, as the killed ones are: what is forked must not have trained before.
    assert not train_in_fork(data, folder / "targets", undisturbed, STAGES).end().killed
    num_kills = max(1, round(20 * scale))
    tally = kill_stages(data, folder / "targets", undisturbed, folder / "runs", seed=SEED, num_kills=num_kills)
    return {"seed": SEED, **vars(tally)}


PARTS: dict[str, Callable[[Path, float], dict[str, Any]]] = {
    "local_operations": local_operations,
    "staged_operations": staged_operations,
    "s3_operations": s3_operations,
    "random_operations": random_operations,
    "random_moments": random_moments,
    "ray": ray,
    "training": training,
}


def _stride(full: int, scale: float) -> int:
    return max(1, round(full / scale))


@contextmanager
def _s3_server(folder: Path) -> Iterator[None]:
    """A process of its own: those that are killed are forked from this one."""
    address = f"http://127.0.0.1:{S3_PORT}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(S3_PORT)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.environ |= {
        "AWS_ENDPOINT_URL": address,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
        "CDP_CACHE_DIR": str(folder / "cache"),
    }
    request = urllib.request.Request(f"{address}/{BUCKET}", method="PUT")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                opener.open(request).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.3)
        yield
    finally:
        server.kill()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="one or several; all of them if not given")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the kills")
    parser.add_argument("--scratch", type=Path, help="folder for the stores; one in memory makes fsync cheap")
    parser.add_argument("--output", type=Path, default=RESULTS / "crash_campaign.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for name in arguments.part or PARTS:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(dir=arguments.scratch, ignore_cleanup_errors=True) as folder:
            outcome = PARTS[name](Path(folder), arguments.scale)
        done = json.loads(arguments.output.read_text())["parts"] if arguments.output.exists() else {}
        command = ["python", "-m", "benchmarks.crash_campaign", "--part", name, "--scale", f"{arguments.scale:g}"]
        done[name] = {"command": " ".join(command), "seconds": round(time.monotonic() - started), **outcome}
        save_result(arguments.output, torch.device("cpu"), command[:3], {"parts": done})
        print(name, json.dumps(done[name]), flush=True)


if __name__ == "__main__":
    main()
