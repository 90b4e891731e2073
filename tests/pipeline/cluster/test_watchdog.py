"""A worker that a call of a library holds for ever ends; one that works, or waits, does not."""

import subprocess
import sys
import time

import pytest

START = "from pipeline.cluster.watchdog import end_when_stuck\nend_when_stuck({})\n"
PATTERN = """
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("a*[^a][^a]"), "isolated")
tokenizer.encode("a" * 1_000_000 + "b")
"""
BUSY = """
import hashlib, time
end = time.monotonic() + 3
while time.monotonic() < end:
    hashlib.sha256(bytes(10_000_000))
time.sleep(2)
"""


def ended(limit_s: float, work: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", START.format(limit_s) + work]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.slow
def test_a_tokenizers_pattern_that_takes_days_ends_the_process_that_waits_for_it() -> None:
    begun = time.monotonic()
    done = ended(2, PATTERN)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert time.monotonic() - begun < 60


@pytest.mark.slow
def test_a_process_that_works_or_sleeps_is_left_alone() -> None:
    assert ended(1, BUSY).returncode == 0
