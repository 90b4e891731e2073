"""What training several small students costs on a CPU, by how threads wait and how many students train at once.

Whole `cdp train-student --sweep` processes, imports included, with the three students of a finished `cdp demo`. Threads
that wait for each other spin by default, and sleep with `OMP_WAIT_POLICY=PASSIVE`, which all commands set.

    cdp demo --output DEMO
    python -m benchmarks.small_steps DEMO --repeats 3
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from benchmarks.results import RESULTS, Spent, command_line, interleaved, median_ratio, save_result
from pipeline.demo.assets import STUDENT_LM, STUDENTS
from pipeline.demo.report import STUDENTS as NAMES

WAYS = {
    "in turn, all cores, sleeping": ({"OMP_WAIT_POLICY": "PASSIVE"}, 1),
    "in turn, all cores, spinning": ({"OMP_WAIT_POLICY": "ACTIVE"}, 1),
    "in turn, one thread": ({"OMP_NUM_THREADS": "1"}, 1),
    "at once": ({}, len(NAMES)),
}
"""Environment, and students at once."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder of a finished demo")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "small_steps.json")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        ways = {
            name: partial(_train, flags.demo, Path(scratch), flags.steps, environment, at_once)
            for name, (environment, at_once) in WAYS.items()
        }
        found = interleaved(ways, flags.repeats)
    first = found[next(iter(ways))]
    ratios = {
        name: {
            part: round(median_ratio([getattr(one, part) for one in of_way], [getattr(one, part) for one in first]), 2)
            for part in Spent._fields
        }
        for name, of_way in found.items()
    }
    medians = {
        name: {part: round(statistics.median(getattr(one, part) for one in of_way), 1) for part in Spent._fields}
        for name, of_way in found.items()
    }
    result = {"steps": flags.steps, "repeats": flags.repeats, "medians": medians, "ratios_to_the_first": ratios}
    save_result(flags.out, torch.device("cpu"), command_line("benchmarks.small_steps"), result)
    print(json.dumps(result, indent=1))


def _train(demo: Path, scratch: Path, steps: int, environment: Mapping[str, str], at_once: int) -> Spent:
    """The first fine-tuning steps of each of the demo's students, behind its finished pre-training."""
    output = scratch / "students"
    shutil.rmtree(output, ignore_errors=True)
    for name in NAMES:
        shutil.copytree(demo / "students" / name / "dpt", output / name / "dpt")
    command = [sys.executable, "-m", "pipeline.cli", "train-student", "--sweep", str(STUDENTS), "--stage", "dft"]
    paths = {"samples": demo / "samples", "targets": demo / "targets", "student": STUDENT_LM, "output": output}
    for name, path in paths.items():
        command += [f"--{name}", str(path)]
    command += ["--set", f"train.dft.max_steps={steps}", "--at-once", str(at_once)]
    return _spent(command, {**os.environ, **environment})


def _spent(command: list[str], environment: Mapping[str, str]) -> Spent:
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, env=dict(environment), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Spent(time.perf_counter() - started, processor)


if __name__ == "__main__":
    main()
