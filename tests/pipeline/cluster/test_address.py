"""Addresses of Ray clusters: what can be none, or where nothing listens, is refused without ray."""

import socket

import pytest

from pipeline.cluster.address import check_address
from storage.errors import UserError


@pytest.mark.parametrize("address", ["auto", "local", "ray://head", "anyscale://cluster"])
def test_what_names_no_port_is_left_to_ray(address: str) -> None:
    check_address(address)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_port_that_listens_is_taken_and_a_closed_one_is_not(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{scheme}127.0.0.1:{server.getsockname()[1]}"
        check_address(address)
    with pytest.raises(UserError, match=rf"no Ray cluster at {address}: .* refused; check --ray-address"):
        check_address(address)


@pytest.mark.parametrize("address", ["", "nonsense", "http://127.0.0.1:8265", "127.0.0.1", "head:", "a b:6379"])
def test_what_is_no_address_of_a_cluster_is_called_that(address: str) -> None:
    with pytest.raises(UserError, match="this is no address of one; expected auto, HOST:6379 or ray://HOST:10001"):
        check_address(address)


def test_a_port_beyond_all_ports_is_refused() -> None:
    with pytest.raises(UserError, match=r"no Ray cluster at 127\.0\.0\.1:99999: "):
        check_address("127.0.0.1:99999")
