"""Connects to a Ray cluster, or starts one for the time of a command, and sees when it is lost."""

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
import ray.util.client
from ray._private.node import Node
from ray.job_config import JobConfig

from pipeline.cluster.address import check_address, knock
from storage.errors import UserError
from storage.safe_path import code_digest, keep_children_safe

ASK_S = 1.0
PATIENCE_S = 30.0
"""A cluster's control process may be restarted; the process is ended by Ray after twice this time."""


@dataclass(frozen=True)
class Cluster:
    """What a connected cluster has."""

    cpus: int
    gpus: int
    gpus_of_a_node: int = 0
    """Those of the node that has the most."""

    def check_room(self, gpus_per_worker: int, num_ranks: int = 1) -> None:
        """Refuses workers that no node has room for, however long they wait.

        Without GPUs a worker may be of `num_ranks` processes, with a core each.

        Raises:
            UserError: If no node has so many GPUs, or there are fewer cores.
        """
        if num_ranks > 1 and not self.gpus:
            if num_ranks > self.cpus:
                raise UserError(
                    f"a worker of {num_ranks} processes (extract.gpus_per_worker, teacher.parallel: tensor) takes as "
                    f"many cores, and the cluster has {self.cpus}, and no GPU; set it to fewer, or start a larger node"
                )
            return
        if gpus_per_worker > max(self.gpus_of_a_node, 1):
            raise UserError(
                f"a worker of {gpus_per_worker} GPUs (extract.gpus_per_worker) fits on no node of the cluster: it has "
                f"{self.gpus} GPUs, at most {self.gpus_of_a_node} on a node; set it to what a node has, or first start "
                "a node with so many"
            )


@contextlib.contextmanager
def connect(address: str | None) -> Iterator[Cluster]:
    """Connects to a cluster, or starts one on this machine for the time of the block.

    The address is that of a running cluster ("auto", "host:6379", "ray://host:10001"); None starts a local one.
    """
    started = not ray.is_initialized()
    if started:
        keep_children_safe()
        # Before a node of the cluster can unpack uploaded files anew, over those that this process runs from.
        code_digest()
        if address is not None:
            check_address(address)
        where: dict[str, Any] = {"address": address}
        if address is None:
            where = {"address": "local", "include_dashboard": False}
        if address is None or not address.startswith("ray://"):
            where["job_config"] = _own_path_only()
        try:
            with _without_api_server():
                ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"no Ray cluster at {address}: {error}; check --ray-address") from error
    try:
        resources = ray.cluster_resources()
        yield Cluster(
            cpus=int(resources.get("CPU", 1)),
            gpus=int(resources.get("GPU", 0)),
            gpus_of_a_node=max(gpus_of_nodes(), default=0),
        )
    finally:
        if started:
            ray.shutdown()


def gpus_of_nodes() -> list[int]:
    """GPUs of each node that is alive."""
    return [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]


@contextlib.contextmanager
def _without_api_server() -> Iterator[None]:
    """A cluster that is started here gets no API server: it would ask the metadata addresses of three clouds."""
    before = Node.start_api_server
    Node.start_api_server = lambda self, **_: None
    try:
        yield
    finally:
        Node.start_api_server = before


def _own_path_only() -> JobConfig:
    """A job whose workers do not import from the folders of the driver: Ray would put its current one first."""

    class NoPaths(list[str]):
        def extend(self, _: Iterable[str]) -> None:
            pass

    config = JobConfig()
    config._py_driver_sys_path = NoPaths()
    return config


class ClusterLost(UserError):
    """The cluster is gone, or the node through which this process uses it."""


class ClusterWatch:
    """Asks now and then whether the cluster that this process is connected to is there.

    Ray itself waits for ever for another node where that of this process is lost, and ends the process without a reason
    where the control process is.
    """

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
    try:
        knock(address)
    except OSError:
        return False
    return True
