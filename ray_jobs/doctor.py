"""``ardiff doctor --address URL``: looks at a cluster from outside, by a job that looks at every node from inside.

ardiff doctor --address http://127.0.0.1:8265 --storage s3://bucket/doctor --workers 2
"""

import argparse
import contextlib
import secrets
import shlex
import shutil
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ardiff.data import storage
from ardiff.doctor import examine, tell
from ardiff.errors import ArdiffError
from ray_jobs.runtime.cluster import await_resource, ray_cluster
from ray_jobs.runtime.stages import versions
from ray_jobs.submit import Submission, add_connection, connection, package, run

Finding = tuple[str, bool, str]
MAX_SKEW = 5.0
"""Seconds; S3 refuses requests that are 15 minutes off, logs are hard to read long before."""
REPEATS = 5


def main(arguments: Sequence[str]) -> int:
    """Examines this machine, or a cluster if an address is given. Returns 0 if all is well, else 1."""
    parser = argparse.ArgumentParser(
        prog="ardiff doctor", description="Says what this machine has, or with --address a cluster, and what to mend."
    )
    add_connection(parser, default=None)
    _add_checks(parser)
    options = parser.parse_args(arguments)
    if options.address is None:
        return examine()
    inside = [f"--workers={options.workers}", f"--megabytes={options.megabytes}", f"--patience={options.patience}"]
    inside += [f"--gpus={options.gpus}"]
    inside += [] if options.storage is None else [f"--storage={options.storage}"]
    name = f"doctor-{secrets.token_hex(4)}"
    with connection(options.address, options.token_file) as client:
        entrypoint = shlex.join(["python", "-m", "ray_jobs.doctor", *inside, f"--here={_here()}"])
        return run(client, Submission(name, entrypoint, package(Path.cwd(), ()), {"job": "doctor"}), told=True)


def _add_checks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--storage", metavar="PLACE", help="folder, s3:// or shared, that every node is to write to")
    parser.add_argument("--workers", type=int, default=2, help="workers between which an all-reduce is timed (2)")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs to wait for, where nodes come with work (0)")
    parser.add_argument("--megabytes", type=int, default=64, help="size of the all-reduce (64)")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds to wait for room for the workers (300)")


def _here() -> str:
    """Versions of the machine that asks."""
    return f"{sys.version_info[0]}.{sys.version_info[1]}/{metadata.version('ray')}"


def inside(arguments: Sequence[str]) -> int:
    """Runs on the cluster. Returns 0 if all is well, else 1."""
    parser = argparse.ArgumentParser()
    _add_checks(parser)
    parser.add_argument("--here", required=True)
    options = parser.parse_args(arguments)
    with ray_cluster(), _probes(options.gpus) as probes:
        nodes = ray.get([probe.examine.remote(options.storage) for probe in probes.values()])
        skews = [_skew(probe) for probe in probes.values()]
        findings = [
            ("nodes", True, f"{len(nodes)}: {', '.join(node.name for node in nodes)}"),
            _versions(nodes, options.here),
            _gpus(nodes, options.gpus),
            *_object_stores(nodes),
            _clocks(nodes, skews),
            *_storage(nodes, options.storage),
            _all_reduce(nodes, options.workers, options.megabytes, options.patience),
        ]
    return tell(findings, "MEND")


@dataclass(frozen=True, slots=True)
class Node:
    """What a node says of itself."""

    name: str
    versions: dict[str, str]
    gpus: list[str]
    """Names of the GPUs that torch sees."""
    counted: float
    """GPUs that Ray counts."""
    cpus: float
    """CPUs that Ray counts; a head without work has none."""
    store: float
    """Bytes of Ray's object store."""
    shared_memory: int
    """Bytes of /dev/shm."""
    storage: str
    """Why storage cannot be used; empty if it can."""


class _Probe:
    """An actor that looks at its node."""

    def __init__(self, name: str, resources: dict[str, float]) -> None:
        self.name, self.resources = name, resources

    def now(self) -> float:
        return time.time()

    def examine(self, place: str | None) -> Node:
        found = versions()
        kept = ("python", "ardiff", "ray", "torch", "numpy", "pyarrow")
        with contextlib.suppress(metadata.PackageNotFoundError):
            found["deepspeed"] = metadata.version("deepspeed")
        return Node(
            self.name,
            {name: found[name] for name in (*kept, "deepspeed") if name in found},
            [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            self.resources.get("GPU", 0.0),
            self.resources.get("CPU", 0.0),
            self.resources.get("object_store_memory", 0.0),
            shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
            "" if place is None else _try_storage(storage.join(place, f"doctor-{secrets.token_hex(8)}")),
        )


def _try_storage(folder: str) -> str:
    """Writes, reads, lists and deletes; says what failed."""
    content = secrets.token_bytes(64)
    try:
        storage.write_bytes(storage.join(folder, "object"), content)
        back = storage.read_bytes(storage.join(folder, "object"))
        listed = storage.list_files(folder)
        storage.delete_folder(folder)
    except ArdiffError as error:
        return str(error)
    return "" if back == content and len(listed) == 1 else f"{folder} gave back something else than was written"


@contextlib.contextmanager
def _probes(gpus: int) -> Iterator[dict[str, Any]]:
    """A probe on every node that is alive, by the node's name, once there are so many GPUs or none more come."""
    await_resource("GPU", gpus)
    probes: dict[str, Any] = {}
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"]:
            pin = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            # GPUs would be hidden from an actor that asks for none.
            environment = {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}
            actor = ray.remote(_Probe).options(num_cpus=0, scheduling_strategy=pin, runtime_env=environment)
            name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            probes[name] = actor.remote(name, node["Resources"])
    yield probes
    for probe in probes.values():
        ray.kill(probe)


def _skew(probe: Any) -> float:
    """Seconds that the node's clock is ahead of this one, by the quickest of some answers."""
    answers: list[tuple[float, float]] = []
    for _ in range(REPEATS):
        before = time.time()
        there = ray.get(probe.now.remote())
        after = time.time()
        answers.append((after - before, there - (before + after) / 2))
    return min(answers)[1]


def _versions(nodes: list[Node], here: str) -> Finding:
    wrong = []
    for package_name in sorted({name for node in nodes for name in node.versions}):
        found = Counter(node.versions.get(package_name, "none") for node in nodes)
        if len(found) > 1:
            usual = found.most_common(1)[0][0]
            others = [f"{n.name} has {n.versions.get(package_name, 'none')}" for n in nodes
                      if n.versions.get(package_name, "none") != usual]  # fmt: skip
            wrong.append(f"{package_name} is {usual}, but {', '.join(others)}")
    if wrong:
        return "versions", False, f"{'; '.join(wrong)}: start all nodes from one image"
    ours = nodes[0].versions
    there = f"{'.'.join(ours['python'].split('.')[:2])}/{ours['ray']}"
    if there != here:
        return "versions", False, f"here are Python and Ray {here}, on the cluster {there}: install the cluster's here"
    return "versions", True, ", ".join(f"{name} {version}" for name, version in ours.items())


def _gpus(nodes: list[Node], wanted: int) -> Finding:
    wrong = [f"{n.name}: Ray counts {n.counted:g}, torch sees {len(n.gpus)}" for n in nodes if len(n.gpus) != n.counted]
    if wrong:
        return "gpus", False, f"{'; '.join(wrong)}: look at nvidia-smi there, and at the driver the image needs"
    kinds = Counter(gpu for node in nodes for gpu in node.gpus)
    text = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    if kinds.total() < wanted:
        return (
            "gpus",
            False,
            f"{text or 'none'}, but {wanted} are wanted: see the autoscaler and its limits",
        )
    return "gpus", True, text or "none now: --gpus N waits for N, where nodes come with work"


def _object_stores(nodes: list[Node]) -> Iterator[Finding]:
    for node in nodes:
        text = f"{node.name}: {node.store / 2**30:.2f} GiB, /dev/shm {node.shared_memory / 2**30:.2f} GiB"
        good = node.store <= node.shared_memory
        yield "object store", good, text + ("" if good else ": it lies on disk; make /dev/shm larger than the store")


def _clocks(nodes: list[Node], skews: list[float]) -> Finding:
    worst = max(range(len(nodes)), key=lambda i: abs(skews[i]))
    text = f"at most {abs(skews[worst]):.3f} s apart from the head"
    if abs(skews[worst]) > MAX_SKEW:
        return "clocks", False, f"{nodes[worst].name} is {skews[worst]:+.1f} s off: let NTP set the clocks"
    return "clocks", True, text


def _storage(nodes: list[Node], place: str | None) -> Iterator[Finding]:
    if place is None:
        yield "storage", True, "not tried: give --storage PLACE"
        return
    wrong = [f"{node.name}: {node.storage}" for node in nodes if node.storage]
    yield "storage", not wrong, "; ".join(wrong) or f"{place}: every node writes, reads, lists and deletes"


def _all_reduce(nodes: list[Node], workers: int, megabytes: int, patience: float) -> Finding:
    """Times what training does after every step, between workers spread over the nodes."""
    gpu = any(node.counted for node in nodes)
    group = placement_group([{"CPU": 1, **({"GPU": 1} if gpu else {})}] * workers, strategy="SPREAD")
    name = "all-reduce"
    try:
        if not group.wait(patience):
            kind = "GPUs" if gpu else "CPUs"
            return name, False, f"no room for {workers} workers in {patience:g} s: are the {kind} busy, or too few?"
        ranks: list[Any] = [
            ray.remote(_Rank)
            .options(
                num_cpus=1,
                num_gpus=int(gpu),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle),
            )
            .remote()
            for bundle in range(workers)
        ]
        address, _ = ray.get(ranks[0].address.remote())
        places = {place for _, place in ray.get([rank.address.remote() for rank in ranks])}
        backend = "nccl" if gpu else "gloo"
        work = [rank.measure.remote(backend, i, workers, address, megabytes) for i, rank in enumerate(ranks)]
        try:
            seconds = max(ray.get(work, timeout=patience))
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            reason = str(error).strip().splitlines()[-1]
            return name, False, f"{backend} fails: {reason}. Are all ports open between the nodes?"
    finally:
        remove_placement_group(group)
    return _bandwidth(nodes, gpu, places, workers, megabytes, seconds)


def _bandwidth(nodes: list[Node], gpu: bool, places: set[str], workers: int, megabytes: int, seconds: float) -> Finding:
    """What the time of an all-reduce between workers at these places says."""
    rate = 2 * (workers - 1) / workers * megabytes * 2**20 / seconds / 1e9
    team = f"{'nccl' if gpu else 'gloo'}, {workers} workers on {len(places)} nodes"
    text = f"{team}: {megabytes} MiB in {seconds * 1000:.1f} ms, {rate:.2f} GB/s"
    able = sum(bool(node.counted if gpu else node.cpus) for node in nodes)
    if workers > 1 and len(places) == 1 and able > 1:
        return "all-reduce", False, f"{text}, all on one of {able} nodes: free the others, to measure between them"
    return "all-reduce", True, text


class _Rank:
    """A worker of the all-reduce."""

    def address(self) -> tuple[str, str]:
        """Where the others find this one, and its node."""
        host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        with socket.socket() as listener:
            listener.bind((host, 0))
            return f"tcp://{host}:{listener.getsockname()[1]}", host

    def measure(self, backend: str, rank: int, size: int, address: str, megabytes: int) -> float:
        """Seconds of an all-reduce, the median of some after one that is not counted."""
        torch.distributed.init_process_group(backend, init_method=address, rank=rank, world_size=size)
        device = torch.device("cuda" if backend == "nccl" else "cpu")
        tensor = torch.ones(megabytes * 2**18, device=device)
        seconds = []
        for _ in range(REPEATS + 1):
            torch.distributed.barrier()
            started = time.perf_counter()
            torch.distributed.all_reduce(tensor)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        torch.distributed.destroy_process_group()
        return statistics.median(seconds[1:])


if __name__ == "__main__":
    raise SystemExit(inside(sys.argv[1:]))
