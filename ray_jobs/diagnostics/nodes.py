"""Checks of every node of a cluster: versions, GPUs, object store, clock, storage and database."""

import contextlib
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ardiff.data import storage
from ardiff.doctor import Finding, check_driver, driver_version
from ardiff.errors import ArdiffError
from ray_jobs.runtime.cluster import await_resource
from ray_jobs.runtime.stages import versions

PACKAGES = ("python", "ardiff", "ray", "torch", "numpy", "pyarrow")
MAX_SKEW = 5.0
"""Seconds that clocks may differ. S3 rejects requests that are 15 minutes off; logs are hard to read long before."""
SKEW_SAMPLES = 5


@dataclass(frozen=True, slots=True)
class Node:
    """Properties of a node, measured on the node."""

    name: str
    versions: dict[str, str]
    gpus: list[str]
    """Names of the GPUs that torch sees."""
    ray_gpus: float
    """GPUs that Ray counts."""
    cpus: float
    """CPUs that Ray counts; 0 for a head that runs no tasks."""
    object_store: float
    """Bytes of Ray's object store."""
    shared_memory: int
    """Bytes of /dev/shm."""
    driver: str
    """Version of the NVIDIA driver; empty without one."""
    cuda: str | None
    """CUDA version of torch; None without CUDA."""
    storage_error: str
    """Why storage cannot be used; empty if it can."""
    database_error: str
    """Why the endpoint's database cannot be used; empty if it can."""
    skew: float = 0.0
    """Seconds by which the node's clock is ahead of the head's."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What all nodes share and each one tests."""

    storage: str | None = None
    """Folder, s3:// or shared."""
    database: str | None = None
    """``postgresql://USER@HOST/NAME``."""
    database_password: str | None = None
    """``env:NAME`` or a file, on the nodes."""


class NodeProbe:
    """An actor that measures its node."""

    def __init__(self, name: str, resources: dict[str, float]) -> None:
        self.name, self.resources = name, resources

    def now(self) -> float:
        """The node's clock."""
        return time.time()

    def examine(self, shared: Shared, skew: float) -> Node:
        """The node's properties."""
        installed = versions()
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed["deepspeed"] = metadata.version("deepspeed")
        return Node(
            self.name,
            {name: installed[name] for name in (*PACKAGES, "deepspeed") if name in installed},
            [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            self.resources.get("GPU", 0.0),
            self.resources.get("CPU", 0.0),
            self.resources.get("object_store_memory", 0.0),
            shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
            driver_version(),
            torch.version.cuda,
            "" if shared.storage is None else _storage_error(shared.storage),
            "" if shared.database is None else _database_error(shared.database, shared.database_password),
            skew,
        )


def _storage_error(uri: str) -> str:
    """Writes, reads, lists and deletes a file. Returns the error, or an empty string."""
    folder, content = storage.join(uri, f"doctor-{secrets.token_hex(8)}"), secrets.token_bytes(64)
    try:
        storage.write_bytes(storage.join(folder, "object"), content)
        read = storage.read_bytes(storage.join(folder, "object"))
        files = storage.list_files(folder)
        storage.delete_folder(folder)
    except ArdiffError as error:
        return str(error)
    return "" if read == content and len(files) == 1 else f"{folder} returns other data than was written"


def _database_error(uri: str, password: str | None) -> str:
    """Asks the database for its time. Returns the error, or an empty string."""
    try:
        from ardiff.serving.database import Database
    except ImportError:
        return "not installed: pip install 'ardiff[serve]'"
    database = Database(uri, password, connections=1)
    try:
        database.now()
    except ArdiffError as error:
        return str(error)
    finally:
        database.close()
    return ""


def examine_nodes(shared: Shared, gpus: int) -> list[Node]:
    """Examines every node that is alive, after a wait for ``gpus`` GPUs."""
    await_resource("GPU", gpus)
    probes: list[Any] = []
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"]:
            affinity = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            # Ray hides the GPUs from an actor that requests none.
            environment = {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}
            actor = ray.remote(NodeProbe).options(num_cpus=0, scheduling_strategy=affinity, runtime_env=environment)
            name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            probes.append(actor.remote(name, node["Resources"]))
    skews = [_skew(probe) for probe in probes]
    nodes = ray.get([probe.examine.remote(shared, skew) for probe, skew in zip(probes, skews, strict=True)])
    for probe in probes:
        ray.kill(probe)
    return list(nodes)


def _skew(probe: Any) -> float:
    """Seconds by which the node's clock is ahead of this one, from the fastest of some answers."""
    answers: list[tuple[float, float]] = []
    for _ in range(SKEW_SAMPLES):
        before = time.time()
        remote_time = ray.get(probe.now.remote())
        after = time.time()
        answers.append((after - before, remote_time - (before + after) / 2))
    return min(answers)[1]


def check_versions(nodes: list[Node], client: str) -> Finding:
    """All nodes have the same versions, and the machine that asks has their Python and Ray (``client``)."""
    differences = []
    for package in sorted({name for node in nodes for name in node.versions}):
        installed = {node.name: node.versions.get(package, "none") for node in nodes}
        usual = Counter(installed.values()).most_common(1)[0][0]
        if others := [f"{name} has {version}" for name, version in installed.items() if version != usual]:
            differences.append(f"{package} is {usual}, but {', '.join(others)}")
    if differences:
        return Finding("versions", False, f"{'; '.join(differences)}: start all nodes from one image")
    common = nodes[0].versions
    cluster = f"{'.'.join(common['python'].split('.')[:2])}/{common['ray']}"
    if cluster != client:
        text = f"this machine has Python and Ray {client}, the cluster {cluster}: install the cluster's versions here"
        return Finding("versions", False, text)
    return Finding("versions", True, ", ".join(f"{name} {version}" for name, version in common.items()))


def check_gpus(nodes: list[Node], wanted: int) -> Finding:
    """Ray and torch see the same GPUs, and there are as many as wanted."""
    differences = [
        f"{n.name}: Ray counts {n.ray_gpus:g}, torch sees {len(n.gpus)}" for n in nodes if len(n.gpus) != n.ray_gpus
    ]
    if differences:
        return Finding("gpus", False, f"{'; '.join(differences)}: check nvidia-smi there, and the node's driver")
    kinds = Counter(gpu for node in nodes for gpu in node.gpus)
    text = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    if kinds.total() < wanted:
        return Finding("gpus", False, f"{text or 'none'}, but {wanted} are wanted: check the autoscaler and its limits")
    return Finding("gpus", True, text or "none now: --gpus N waits until an autoscaler has started N")


def check_drivers(nodes: list[Node]) -> Iterator[Finding]:
    """Every driver runs torch's CUDA; see :func:`ardiff.doctor.check_driver`."""
    for node in nodes:
        if node.driver:
            name, ok, text = check_driver(node.cuda, node.driver)
            yield Finding(name, ok, f"{node.name}: {text}")


def check_object_stores(nodes: list[Node]) -> Iterator[Finding]:
    """Every object store fits into shared memory."""
    for node in nodes:
        text = f"{node.name}: {node.object_store / 2**30:.2f} GiB, /dev/shm {node.shared_memory / 2**30:.2f} GiB"
        ok = node.object_store <= node.shared_memory
        yield Finding("object store", ok, text + ("" if ok else ": it is on disk; make /dev/shm larger than the store"))


def check_clocks(nodes: list[Node]) -> Finding:
    """The clocks agree with the head's."""
    worst = max(nodes, key=lambda node: abs(node.skew))
    if abs(worst.skew) > MAX_SKEW:
        return Finding("clocks", False, f"{worst.name} is {worst.skew:+.1f} s off: let NTP set the clocks")
    return Finding("clocks", True, f"at most {abs(worst.skew):.3f} s apart from the head")


def check_storage(nodes: list[Node], folder: str | None) -> Finding:
    """Every node can use the storage."""
    if folder is None:
        return Finding("storage", True, "not tested: give --storage URI")
    errors = [f"{node.name}: {node.storage_error}" for node in nodes if node.storage_error]
    text = "; ".join(errors) or f"{folder}: every node writes, reads, lists and deletes"
    return Finding("storage", not errors, text)


def check_database(nodes: list[Node], uri: str | None) -> Finding:
    """Every node can use the endpoint's database."""
    if uri is None:
        return Finding("database", True, "not tested: give --database URI of the endpoint")
    errors = [f"{node.name}: {node.database_error}" for node in nodes if node.database_error]
    return Finding("database", not errors, "; ".join(errors) or f"{uri}: every node runs a statement")
