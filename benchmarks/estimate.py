"""How near `cdp estimate` comes to the extraction it speaks of, on the bundled example: bytes and seconds.

Estimate and extraction (one worker, in this process) take turns; ratios are estimated over found, so above 1 is too
much. Seconds are those of the worker from its loaded teacher to its end, by two clocks: the processor's, of all threads
together, which says something on a shared machine as well, and the wall's, which does so only where nothing else runs.
On a CPU the estimate adds up the worker's work, so it is the first that it foretells; where cores are free, coding and
writing go on beside the teacher, and the wall's time is shorter. `load_average` tells how many processes wanted to run.

    python -m benchmarks.estimate
"""

import argparse
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.results import RESULTS, Spent, command_line, save_result, spent
from pipeline.demo.assets import TEACHER
from pipeline.demo.scenes.dataset import write_dataset
from pipeline.extraction.extract import SHARDS_IN_FLIGHT
from pipeline.extraction.shard_extractor import ShardExtractor
from pipeline.extraction.tally import stored_bytes
from pipeline.run_file import load_run_file
from pipeline.runtime.cpu_determinism import make_cpu_deterministic
from stages.estimate.measured import estimate_by_measurement
from stages.estimate.report import EstimateConfig
from stages.samples.pack import PackConfig, pack_samples
from stages.teacher.config import TeacherConfig
from stages.teacher.identity import identify_teacher
from storage.codecs.codec_settings import MapCodecName
from storage.samples.index import SampleIndex
from storage.samples.sample_set import SampleSet
from storage.stores import open_store
from storage.targets.manifest import create_or_check

THREADS = 1


def compare(folder: Path, codec: MapCodecName, repeats: int, config: EstimateConfig) -> dict[str, Any]:
    """Estimated over found for one codec, on the samples in `folder`."""
    flags = {"teacher.checkpoint": str(TEACHER), "teacher.map_codec": codec, "extract.workers": 1}
    run = load_run_file(Path("demo"), [], flags)
    assert run.teacher is not None
    samples = str(folder / "samples")
    found: list[dict[str, Any]] = []
    estimate_now = partial(
        estimate_by_measurement, run.teacher, SampleSet.open(samples), config, workers=1, threads=THREADS
    )
    for number in range(repeats):
        by_wall = estimate_now().settings[codec]
        # All seconds that the estimate measures, by the other clock.
        with patch.object(time, "perf_counter", time.process_time):
            estimate = estimate_now()
        setting = estimate.settings[codec]
        num_bytes, taken = extract_alone(run.teacher, samples, str(folder / f"{codec}-{number}"))
        assert setting.shard_bytes_95 is not None
        found.append(
            {
                "bytes": setting.shard_bytes / num_bytes,
                "processor_s": setting.worker_seconds / taken.cpu_s,
                "wall_s": by_wall.worker_seconds / taken.wall_s,
                "estimated_bytes": setting.shard_bytes,
                "estimated_bytes_95": setting.shard_bytes_95,
                "found_bytes": num_bytes,
                "estimated_processor_s": setting.worker_seconds,
                "found_processor_s": taken.cpu_s,
                "estimated_wall_s": by_wall.worker_seconds,
                "found_wall_s": taken.wall_s,
                "load_average": os.getloadavg()[0],
            }
        )
    return {
        "samples": estimate.num_samples,
        "shards": estimate.num_shards,
        "num_sampled": estimate.num_sampled,
        "num_measured": estimate.num_measured,
        "estimated_over_found": {
            name: statistics.median(each[name] for each in found) for name in ("bytes", "processor_s", "wall_s")
        },
        "each": found,
    }


def extract_alone(teacher: TeacherConfig, samples: str, targets: str) -> tuple[int, Spent]:
    """Bytes of all shards, and time of the one worker that made them, from its loaded teacher on."""
    index, store = SampleIndex.load(open_store(samples)), open_store(targets)
    manifest = identify_teacher(teacher, on_gpu=False).manifest(index.digest, len(index.shards))
    create_or_check(store, manifest)
    worker = ShardExtractor(teacher, samples, targets, manifest, THREADS)
    num_bytes = 0

    def run() -> None:
        nonlocal num_bytes
        # As many at once as a worker of Ray has in flight.
        with ThreadPoolExecutor(SHARDS_IN_FLIGHT) as threads:
            records = list(threads.map(lambda shard: worker(shard, lambda _: None), range(len(index.shards))))
        num_bytes = sum(stored_bytes(record) for record in records if record is not None)

    taken = spent(run)
    return num_bytes, taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--codecs", nargs="+", default=["sqrt4", "float16"])
    parser.add_argument("--out", type=Path, default=RESULTS / "estimate.json")
    flags = parser.parse_args()
    make_cpu_deterministic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder / "scenes", flags.images, 0, "shapes", 4)
        pack_samples(
            folder / "scenes" / "train.json",
            folder / "scenes",
            folder / "samples",
            PackConfig(max_samples_per_shard=256),
        )
        result = {codec: compare(folder, codec, flags.repeats, EstimateConfig()) for codec in flags.codecs}
    save_result(flags.out, torch.device("cpu"), command_line("benchmarks.estimate"), result)
    print(flags.out.read_text())


if __name__ == "__main__":
    main()
