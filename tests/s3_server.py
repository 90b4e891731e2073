"""An S3 server on loopback, with credentials that open nothing else."""

import os
from collections.abc import Iterator
from unittest.mock import patch

import pytest

BUCKET = "cdp-tests"


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[dict[str, str]]:
    server_module = pytest.importorskip("moto.server")
    obstore = pytest.importorskip("obstore")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
    import urllib.request

    request = urllib.request.Request(f"http://{host}:{port}/{BUCKET}", method="PUT")
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request):
        pass
    assert obstore
    yield environment
    server.stop()


@pytest.fixture
def s3_bucket(_s3_server: dict[str, str]) -> Iterator[str]:
    """URL of an S3 bucket; the environment holds its endpoint while the test runs."""
    with patch.dict(os.environ, _s3_server):
        yield f"s3://{BUCKET}"
