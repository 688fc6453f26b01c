"""Times the all-reduce of a training step between workers on several nodes."""

import socket
import statistics
import time
from typing import Any

import ray
import torch
import torch.distributed
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ardiff.doctor import Finding
from ray_jobs.diagnostics.nodes import Node

REPEATS = 5


def check_all_reduce(nodes: list[Node], workers: int, megabytes: int, timeout: float) -> Finding:
    """Times an all-reduce of ``megabytes`` MiB between ``workers`` workers, spread over the nodes."""
    gpu = any(node.ray_gpus for node in nodes)
    group = placement_group([{"CPU": 1, **({"GPU": 1} if gpu else {})}] * workers, strategy="SPREAD")
    try:
        if not group.wait(timeout):
            kind = "GPUs" if gpu else "CPUs"
            text = f"no resources for {workers} workers in {timeout:g} s: the {kind} are busy, or too few"
            return Finding("all-reduce", False, text)
        ranks: list[Any] = []
        for bundle in range(workers):
            strategy = PlacementGroupSchedulingStrategy(group, bundle)
            ranks.append(
                ray.remote(_Rank).options(num_cpus=1, num_gpus=int(gpu), scheduling_strategy=strategy).remote()
            )
        address, _ = ray.get(ranks[0].address.remote())
        hosts = {host for _, host in ray.get([rank.address.remote() for rank in ranks])}
        backend = "nccl" if gpu else "gloo"
        timings = [rank.measure.remote(backend, i, workers, address, megabytes) for i, rank in enumerate(ranks)]
        try:
            seconds = max(ray.get(timings, timeout=timeout))
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            reason = str(error).strip().splitlines()[-1]
            return Finding("all-reduce", False, f"{backend} fails: {reason}. Open all ports between the nodes.")
    finally:
        remove_placement_group(group)
    return bandwidth(nodes, gpu, hosts, workers, megabytes, seconds)


def bandwidth(nodes: list[Node], gpu: bool, hosts: set[str], workers: int, megabytes: int, seconds: float) -> Finding:
    """The bandwidth of an all-reduce that took ``seconds`` between workers on ``hosts``."""
    rate = 2 * (workers - 1) / workers * megabytes * 2**20 / seconds / 1e9
    setup = f"{'nccl' if gpu else 'gloo'}, {workers} workers on {len(hosts)} nodes"
    text = f"{setup}: {megabytes} MiB in {seconds * 1000:.1f} ms, {rate:.2f} GB/s"
    usable = sum(bool(node.ray_gpus if gpu else node.cpus) for node in nodes)
    if workers > 1 and len(hosts) == 1 and usable > 1:
        text += f", all on one of {usable} nodes: free the others to measure the network between them"
        return Finding("all-reduce", False, text)
    return Finding("all-reduce", True, text)


class _Rank:
    """A worker of the all-reduce."""

    def address(self) -> tuple[str, str]:
        """An address at which this worker can listen, and its host."""
        host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        with socket.socket() as listener:
            listener.bind((host, 0))
            return f"tcp://{host}:{listener.getsockname()[1]}", host

    def measure(self, backend: str, rank: int, size: int, address: str, megabytes: int) -> float:
        """Median seconds of an all-reduce, after one warm-up."""
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
