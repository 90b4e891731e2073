"""Commands wait for the threads of an operation asleep, unless the user says otherwise."""

from pathlib import Path

import pytest

from tests.pipeline.processes import cdp


@pytest.mark.parametrize(
    ("said", "expected"), [(None, "GOMP_SPINCOUNT = '0'"), ("ACTIVE", "OMP_WAIT_POLICY = 'ACTIVE'")]
)
def test_a_waiting_thread_of_torch_sleeps_unless_the_environment_says_otherwise(
    said: str | None, expected: str, targets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if said is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", said)
    # OpenMP says what it has read when torch is imported.
    monkeypatch.setenv("OMP_DISPLAY_ENV", "VERBOSE")
    ended = cdp("verify", targets)
    assert ended.code == 0, ended.err
    assert expected in ended.err
