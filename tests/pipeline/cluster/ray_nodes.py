"""A Ray cluster of several nodes on this machine, in a process of its own: one process can hold one cluster only.

Run as a script it starts a head without slots, prints its address, and obeys lines: `add NAME GPUS`, `kill NAME`. The
end of its input ends the cluster. A port as its argument is where the dashboard listens; without one there is none.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.processes import PATIENCE_S, descendants, kill


class Nodes:
    """The cluster, seen from the test."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.address = self._answer()

    def add(self, name: str, gpus: int = 0) -> None:
        """A node with one slot joins, and with GPUs that only Ray believes in."""
        self._tell(f"add {name} {gpus}")

    def kill(self, name: str) -> None:
        """The node's processes are killed."""
        self._tell(f"kill {name}")

    def workers(self) -> list[int]:
        """Processes of the workers that an extraction has on it."""
        names = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants(self._process.pid)}
        return [pid for pid, name in names.items() if name.startswith(b"ray::_Actor")]

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        assert self._answer() == line

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("> "):
                return line.removeprefix("> ").strip()
        raise AssertionError("the process of the cluster ended")


@contextmanager
def nodes(*names: str, dashboard_port: int | None = None) -> Iterator[Nodes]:
    """A cluster with these nodes beside its head."""
    port = [] if dashboard_port is None else [str(dashboard_port)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.pipeline.cluster.ray_nodes", *port],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=dict(os.environ),
    )
    try:
        cluster = Nodes(process)
        for name in names:
            cluster.add(name)
        yield cluster
        assert process.stdin is not None
        process.stdin.close()
        process.wait(PATIENCE_S)
    finally:
        kill(process)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.stdout.close()


def main() -> None:
    from ray.cluster_utils import Cluster

    # Of the numbers that no machine has; Ray wants as many as a node has GPUs.
    os.environ["CUDA_VISIBLE_DEVICES"] = "90,91"

    head = {"num_cpus": 0, "num_gpus": 0, "include_dashboard": len(sys.argv) > 1}
    if len(sys.argv) > 1:
        # Its agent's own port may be that of another cluster of this machine.
        head |= {"dashboard_port": int(sys.argv[1]), "dashboard_agent_listen_port": 0}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    say(cluster.address)
    started = {}
    with TemporaryDirectory(prefix="ray") as folder:
        for line in sys.stdin:
            order, name, *gpus = line.split()
            if order == "add":
                # As on a machine of its own: a node unpacks uploaded files in its folder, over those that lie there.
                started[name] = cluster.add_node(num_cpus=1, num_gpus=int(gpus[0]), temp_dir=f"{folder}/{name}")
            else:
                cluster.remove_node(started.pop(name), allow_graceful=False)
            say(line.strip())
        cluster.shutdown()


def say(text: str) -> None:
    print(f"> {text}", flush=True)


if __name__ == "__main__":
    main()
