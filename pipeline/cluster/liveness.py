"""Whether the Ray cluster that a driver is connected to is still there.

Ray itself waits for ever for another node where the driver's own is lost, and ends the process where the cluster is.
"""

import socket
import time

import ray
import ray.util.client

from storage.errors import UserError

ASK_S = 1.0
PATIENCE_S = 30.0
"""A cluster's control process may be restarted; the process is ended by Ray after twice this time."""


class ClusterLost(UserError):
    """The cluster is gone, or the node through which this process uses it."""


class ClusterWatch:
    """Asks now and then whether the cluster that this process is connected to is there."""

    def __init__(self) -> None:
        context = ray.get_runtime_context()
        self._node: str = context.get_node_id()
        # A client speaks to the head node alone, and loses that connection with it.
        is_client = ray.util.client.ray.is_connected()
        self._control: str | None = None if is_client else context.gcs_address
        self._raylet: str | None = None
        if not is_client:
            (own,) = (node for node in ray.nodes() if node["NodeID"] == self._node)
            self._raylet = f"{own['NodeManagerAddress']}:{own['NodeManagerPort']}"
        self._asked, self._answered = 0.0, time.monotonic()

    def just_answered(self) -> bool:
        """Whether it was asked now, and answered: then a question to it will not wait without an end.

        Raises:
            ClusterLost: If the cluster is lost.
        """
        now = time.monotonic()
        if now < self._asked + ASK_S:
            return False
        self._asked = now
        if self._control is not None and not _listens(self._control):
            if now > self._answered + PATIENCE_S:
                raise lost(f"its control process at {self._control} has not answered for {PATIENCE_S:.0f} s")
            return False
        self._answered = now
        # Seen here before Ray sees it: then Ray ends the process where it uses the raylet's memory.
        if self._raylet is not None and not _listens(self._raylet):
            raise lost("the raylet of this machine died")
        if not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == self._node):
            raise lost("the node of this process died")
        return True


def lost(found: str) -> ClusterLost:
    """The error that says what happened to the cluster."""
    return ClusterLost(f"the Ray cluster is lost: {found}; what is stored stays, run the same command again")


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE_S / 3).close()
    except OSError:
        return False
    return True
