"""The S3 server of the tests behind a middleware that fails on purpose, as networks and servers do."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest

BUCKET = "cdp-faults"

Environ = dict[str, Any]
Start = Callable[..., Any]
App = Callable[[Environ, Start], Iterable[bytes]]


@dataclass
class Faults:
    """Which requests fail and how; a fault is used up by as many requests as `times` says."""

    planned: list["Fault"] = field(default_factory=list)
    guard: threading.Lock = field(default_factory=threading.Lock)

    def plan(self, kind: str, method: str, path: str = "", times: int = 1) -> "Fault":
        """Let the next requests of this method, whose path holds `path`, fail.

        Args:
            kind: `500` before anything is done; `lost`: 500 after it was done; `drop`: the connection ends without an
                answer; `cut`: it ends in the middle of the answer; `slow`: the answer takes longer than the client
                waits; `401`, `403`.
            method: HTTP method.
            path: Part of the path.
            times: How many requests.
        """
        fault = Fault(kind, method, path, times)
        self.planned.append(fault)
        return fault

    def next(self, method: str, path: str) -> str | None:
        """The fault of a request, None if it is served."""
        with self.guard:
            for fault in self.planned:
                if fault.method == method and fault.path in path and fault.used < fault.times:
                    fault.used += 1
                    return fault.kind
        return None


@dataclass
class Fault:
    """A planned fault."""

    kind: str
    method: str
    path: str
    times: int
    used: int = 0
    """Requests that met it."""


SLOW_S = 4.0


def failing(app: App, faults: Faults) -> App:
    """The app behind the faults."""

    def serve(environ: Environ, start: Start) -> Iterable[bytes]:
        kind = faults.next(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        if kind in ("500", "401", "403"):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start(f"{kind} Fault", [("Content-Length", "0")])
            return []
        if kind == "drop":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            return []
        if kind == "slow":
            time.sleep(SLOW_S)
        if kind == "lost":
            list(app(environ, lambda *_: None))
            start("500 Lost", [("Content-Length", "0")])
            return []
        if kind == "cut":
            body: list[bytes] = []
            head: list[Any] = []
            body += app(environ, lambda *answer: head.extend(answer))
            start(*head[:2])
            whole = b"".join(body)
            return _cut(whole[: len(whole) // 2], environ["werkzeug.socket"])
        return app(environ, start)

    return serve


def _cut(half: bytes, connection: socket.socket) -> Iterator[bytes]:
    yield half
    connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="session")
def _faulty_server() -> Iterator[tuple[dict[str, str], Faults]]:
    moto_server = pytest.importorskip("moto.server")
    pytest.importorskip("obstore")
    from werkzeug.serving import make_server

    faults = Faults()
    app = moto_server.DomainDispatcherApplication(moto_server.create_backend_app)
    server = make_server("127.0.0.1", 0, failing(app, faults), threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
    import urllib.request

    request = urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request):
        pass
    yield environment, faults
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def faulty_s3(
    _faulty_server: tuple[dict[str, str], Faults], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Faults]]:
    """URL of a bucket, and the faults to plan on it; clients give up soon, so that tests are quick."""
    from storage.stores import objects

    environment, faults = _faulty_server
    monkeypatch.setattr(objects, "MAX_RETRIES", 3)
    monkeypatch.setattr(objects, "TIMEOUT_S", SLOW_S / 4)
    faults.planned.clear()
    with patch.dict(os.environ, environment), patch.dict(objects._clients, clear=True):
        yield f"s3://{BUCKET}", faults
