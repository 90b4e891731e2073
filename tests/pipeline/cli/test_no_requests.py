"""No command asks anything of a hub, an object store or a cloud unless an argument names one."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.conftest import TinyWorld
from tests.pipeline.processes import cdp
from tests.pipeline.runs import SETTINGS

pytestmark = pytest.mark.slow
OF_A_PROXY = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
OF_A_SERVICE = ("HF_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_EC2_METADATA_SERVICE_ENDPOINT", "AWS_METADATA_ENDPOINT")
TAKEN_AWAY = (
    *("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "RAY_USAGE_STATS_ENABLED"),
    *("AWS_EC2_METADATA_DISABLED", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ALLOW_HTTP"),
)
"""What an environment may hold that keeps a command from asking."""


@contextmanager
def recorder() -> Iterator[tuple[str, list[bytes]]]:
    """A server on loopback that hangs up; its address, and how each request to it began."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        heard.append(connection.recv(200))

        threading.Thread(target=listen, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}", heard
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """All requests of the commands that a test runs, to whatever address, as they go through a proxy."""
    with recorder() as (address, heard):
        for name in TAKEN_AWAY:
            monkeypatch.delenv(name, raising=False)
        for name in ("NO_PROXY", "no_proxy"):  # processes of Ray speak to each other
            monkeypatch.setenv(name, "127.0.0.1,localhost")
        for name in (*OF_A_PROXY, *OF_A_SERVICE):
            monkeypatch.setenv(name, f"http://{address}")
        monkeypatch.setenv("GCE_METADATA_HOST", address)
        yield heard


def test_a_hub_id_and_a_bucket_are_asked_for(requests: list[bytes], tmp_path: Path) -> None:
    assert cdp("convert-checkpoint", "nobody/nothing", tmp_path / "out").code == 2
    assert any(b"nothing" in request or b"CONNECT" in request for request in requests), requests
    requests.clear()
    assert cdp("inspect", "s3://nobodys-bucket/targets").code == 2
    assert requests


def test_commands_on_folders_ask_nothing_of_anyone(
    requests: list[bytes], tiny: TinyWorld, targets: Path, tmp_path: Path
) -> None:
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    extracted = ("--targets", tmp_path / "targets", "--samples", tiny.samples)
    student = tmp_path / "run/dpt/student"
    for words in (
        ("extract-teacher", "--teacher", tiny.teacher, *extracted),
        ("verify", tmp_path / "targets", "--samples", tiny.samples),
        ("inspect", tmp_path / "targets"),
        (
            "train-student",
            "--stage",
            "dpt",
            *extracted,
            "--student",
            tiny.student_lm,
            "--output",
            tmp_path / "run",
            *settings,
        ),
        ("evaluate", student, "--suite", "sugarcrepe", "--data", tiny.pairs, "--output", tmp_path / "evaluated"),
        ("export", student, tmp_path / "exported"),
    ):
        ended = cdp(*words)
        assert ended.code == 0, ended.err
        assert requests == [], words
