"""The share of time in which the teacher waits."""

import time

import pytest

from stages.teacher.timings import Timings, waited_share


def test_time_between_forward_passes_is_waited_for_and_time_before_the_first_is_not() -> None:
    timings = Timings()
    time.sleep(0.2)
    for _ in range(2):
        with timings.forward():
            time.sleep(0.02)
        time.sleep(0.05)
    seconds = timings.seconds()
    assert seconds.keys() == {"forward", "waited"}
    assert seconds["forward"] >= 0.04
    assert 0.05 <= seconds["waited"] < 0.2


def test_a_failed_block_is_counted_too() -> None:
    timings = Timings()
    with pytest.raises(KeyError), timings.forward():
        raise KeyError
    assert timings.seconds()["forward"] > 0


def test_the_share_is_of_the_time_since_the_first_forward_pass() -> None:
    assert waited_share({"forward": 3.0, "waited": 1.0, "coding": 9.0}) == 0.25
    assert waited_share({"forward": 3.0}) == 0.0
    assert waited_share({"preparing": 1.0}) is None
