"""Every decoder that may be split over processes says, split over two, what it says whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from stages.teacher.tensor_split import SPLIT_DECODERS
from tests.processes import PATIENCE_S
from tests.stages.extracted_families import make_samples
from tests.tiny_families import make_tiny_family

FAMILIES = ("gemma3", "glm4v", "idefics3", "internvl", "llava_next", "qwen2_5_vl", "qwen2_vl")


@pytest.mark.slow
def test_tiny_teachers_of_each_decoder_say_split_what_they_say_whole(tmp_path: Path) -> None:
    make_samples(tmp_path)
    checkpoints = [make_tiny_family(tmp_path / "teachers" / family, family) for family in FAMILIES]
    decoders = {AutoConfig.from_pretrained(checkpoint).get_text_config().model_type for checkpoint in checkpoints}
    assert decoders == SPLIT_DECODERS
    run = [sys.executable, "-m", "tests.stages.teacher.split_families"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*run, "1", str(tmp_path)], env=environment) as other:
        try:
            done = subprocess.run(
                [*run, "0", str(tmp_path)],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
                timeout=PATIENCE_S,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-3000:]
            assert other.wait(PATIENCE_S) == 0
        finally:
            other.kill()
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found) == set(FAMILIES)
    for family, ways in found.items():
        for way in ways:
            assert way["maps"] < 5e-6, family
            assert way["answers"] < 5e-4, family
            assert way["logprobs"] < 2e-2, family
            assert way["same_rows"] >= 0.9 * way["rows"] > 0, family
            assert way["maps_seen"] > 4, family
