"""A Ray cluster of several nodes on this machine. Each node is a raylet on a loopback address; all need a token."""

import contextlib
import json
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from jobs import PATIENCE, Jobs
from ports import free_ports


class Cluster(Jobs):
    """A head, and nodes that can be added and killed. Jobs started here run on it."""

    def __init__(self, head_cpus: int = 4, redis_password: str = "", **environment: str) -> None:
        super().__init__()
        # Ray's own timeouts are for machines that do nothing else.
        self.environment |= {"RAY_gcs_server_port_wait_time_s": "300", "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300"}
        self.environment |= environment
        self.redis_password = redis_password
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.metrics_ports: list[int] = []
        """The port of each node's Prometheus exporter."""
        token = Path(self.ray_folder) / "token"
        token.write_text(secrets.token_hex(32))
        self.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{self.environment['PATH']}"  # for submitted jobs
        for attempt in range(3):  # on an overloaded machine Ray gives up a node whose processes start slowly
            try:
                self._start_head(head_cpus)
                break
            except AssertionError:
                if attempt == 2:
                    raise
                for process in self.alive():
                    process.kill()
                self.nodes.clear()
                self.metrics_ports.clear()

    def _start_head(self, cpus: int) -> None:
        self.address, self.dashboard = f"127.0.0.2:{free_ports()}", f"127.0.0.1:{free_ports()}"
        self.environment.pop("RAY_ADDRESS", None)
        host, _, port = self.dashboard.partition(":")
        options = ["--head", f"--port={self.address.partition(':')[2]}", f"--num-cpus={cpus}"]
        options += [f"--dashboard-host={host}", f"--dashboard-port={port}", "--include-dashboard=true"]
        options += [f"--ray-client-server-port={free_ports()}", f"--node-ip-address={self._address(0)}"]
        if self.redis_password:
            options.append(f"--redis-password={self.redis_password}")
        self.head_options = options
        self._start(*self.head_options)
        self.environment["RAY_ADDRESS"] = self.address
        self.wait_for_nodes(1)

    def restart_head(self) -> None:
        """SIGKILL to the head and all its processes, then another head at the same addresses. It needs Redis."""
        for attempt in range(3):  # as for the first one
            self.kill_node(self.nodes[0])
            self.environment.pop("RAY_ADDRESS", None)  # no head is there to be joined
            # The other nodes of this machine make Ray think that the head still runs.
            (Path(self.ray_folder) / "ray" / "ray_current_cluster").unlink(missing_ok=True)
            self._start(*self.head_options)
            self.nodes[0], self.metrics_ports[0] = self.nodes.pop(), self.metrics_ports.pop()
            self.environment["RAY_ADDRESS"] = self.address
            try:
                self.wait_for_nodes(len(self.nodes))
                return
            except AssertionError:
                if attempt == 2:
                    raise

    def add_node(self, cpus: int, gpus: int = 0) -> subprocess.Popen[bytes]:
        """Starts another node and waits until it is alive. Its GPUs exist only in Ray's count."""
        for attempt in range(3):  # as for the head
            options = [f"--address={self.address}", f"--node-ip-address={self._address(len(self.nodes))}"]
            node = self._start(*options, f"--num-cpus={cpus}", f"--num-gpus={gpus}")
            try:
                self.wait_for_nodes(sum(n.poll() is None for n in self.nodes))
            except AssertionError:
                if attempt == 2:
                    raise
                self.kill_node(node)
                self.nodes.remove(node)
                self.metrics_ports.pop()
            else:
                return node
        raise AssertionError

    def wait_for_nodes(self, count: int) -> None:
        """Waits until ``count`` nodes are alive. Raises AssertionError if the head or the newest has ended."""
        deadline, alive = time.monotonic() + PATIENCE, -1
        while alive != count:
            for node in (self.nodes[0], self.nodes[-1]):
                assert node.poll() is None, f"a node ended with {node.returncode}"
            assert time.monotonic() < deadline, f"{alive} nodes, not {count}, in {PATIENCE} seconds"
            time.sleep(0.2)
            with contextlib.suppress(OSError):
                alive = len(self._alive_nodes())

    def drain_node(self, node: subprocess.Popen[bytes], seconds: int) -> None:
        """Ray's own call: the node will be gone after ``seconds``."""
        address = self._address(self.nodes.index(node))
        [node_id] = [n["nodeId"] for n in self._alive_nodes() if n["nodeManagerAddress"] == address]
        options = [f"--node-id={node_id}", "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={self.address}", *options]
        subprocess.run([*command, f"--deadline-remaining-seconds={seconds}"], env=self.environment, check=True)

    def _alive_nodes(self) -> list[dict[str, Any]]:
        """What the dashboard says about the raylet of each node that is alive. Raises OSError."""
        url, token = f"http://{self.dashboard}/nodes?view=summary", Path(self.environment["RAY_AUTH_TOKEN_PATH"])
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token.read_text()}"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            raylets = [node["raylet"] for node in json.load(answer)["data"]["summary"]]
        return [raylet for raylet in raylets if raylet.get("state") == "ALIVE"]

    @staticmethod
    def _address(index: int) -> str:
        """The loopback address of a node; the head is the first."""
        return f"127.0.0.{index + 2}"

    def kill_node(self, node: subprocess.Popen[bytes]) -> None:
        """SIGKILL to a node: its raylet and everything that runs on it."""
        for process in self.alive():
            with contextlib.suppress(psutil.Error):  # the process may end meanwhile
                if node.pid in [ancestor.pid for ancestor in process.parents()]:
                    process.kill()
        node.kill()
        node.wait()

    def close(self) -> None:
        """Stops all nodes, the head last, and checks that no process is left."""
        for node in reversed(self.nodes):
            if node.poll() is None:
                node.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    node.wait(PATIENCE)
        super().close()

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        self.metrics_ports.append(free_ports())
        ports = [f"--dashboard-agent-listen-port={free_ports()}", f"--metrics-export-port={self.metrics_ports[-1]}"]
        # Otherwise the agents choose these ports, and a node gives up after waiting 15 seconds for them.
        ports += [f"--dashboard-agent-grpc-port={free_ports()}", f"--runtime-env-agent-port={free_ports()}"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments, *ports]
        node = subprocess.Popen(
            [*command, "--block", "--object-store-memory=150000000", "--disable-usage-stats"],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.nodes.append(node)
        return node
