"""Runs a function in several processes that form a gloo group, without Ray."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ports import free_ports


def run_workers(count: int, function: Callable[..., None], *arguments: Any) -> None:
    """Calls ``function(*arguments)`` in ``count`` processes; raises if one fails."""
    mp.spawn(_enter, (count, free_ports(), function, arguments), nprocs=count)  # type: ignore[no-untyped-call]


def _enter(rank: int, count: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=count)
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()
    os._exit(0)  # at once: threads of gloo's that are still there abort the interpreter's end now and then
