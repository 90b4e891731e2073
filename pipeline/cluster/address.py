"""The address of a Ray cluster: whether something listens there, known without loading ray."""

import re
import socket

from storage.errors import UserError

CONNECT_TIMEOUT_S = 10.0
_ADDRESS = re.compile(r"(ray://)?(?P<host>\[[^\]]+\]|[^\[\]/:\s]+):(?P<port>[0-9]{1,5})")
_KNOWN_TO_RAY = re.compile("auto|local|ray://[^:/]+|(?!https?://)[a-z][a-z0-9+.-]*://.*")
"""What names no port: Ray finds the cluster itself, or hands the address to a package that is installed for it."""


def check_address(address: str) -> None:
    """Refuses an address at which no cluster can be, or nothing listens: Ray itself tries for minutes.

    Raises:
        UserError: If it is one.
    """
    if _ADDRESS.fullmatch(address) is None:
        if _KNOWN_TO_RAY.fullmatch(address):
            return
        raise UserError(
            f"no Ray cluster at {address}: this is no address of one; expected auto, HOST:6379 or ray://HOST:10001 in "
            "--ray-address (http addresses are of dashboards and of `ray job submit`)"
        )
    try:
        knock(address.removeprefix("ray://"))
    except (OSError, OverflowError) as error:
        raise UserError(
            f"no Ray cluster at {address}: {error}; check --ray-address, and that the cluster was started there"
        ) from error


def knock(address: str) -> None:
    """Connects to `host:port` and hangs up; raises what the network does."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
