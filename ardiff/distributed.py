"""Collectives over the ranks of torch's process group. Without a process group, this process is rank 0 of 1."""

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This process's rank, 0-based."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over(values: list[float] | Tensor, device: torch.device) -> list[float]:
    """Elementwise sums over all ranks, in float64. The lists or vectors must be equally long.

    A float64 tensor on ``device`` may be changed. On a GPU the CPU waits for the result, once.
    """
    total = torch.as_tensor(values, dtype=torch.float64, device=device)
    if size() > 1:
        dist.all_reduce(total)
    return total.tolist()


def max_over(values: list[float], device: torch.device) -> list[float]:
    """Elementwise maxima over all ranks, in float64. The lists must be equally long."""
    if size() == 1:
        return values
    largest = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def average_(tensors: list[Tensor], bucket_size: int = 2**24) -> None:
    """Replaces each tensor by its mean over all ranks, in place. All ranks must pass the same tensors in the same
    order.

    Tensors are exchanged in buckets of at most ``bucket_size`` elements, or of one larger tensor.
    """
    if size() == 1:
        return
    remaining = list(reversed(tensors))
    while remaining:
        bucket = [remaining.pop()]
        while remaining and sum(t.numel() for t in bucket) + remaining[-1].numel() <= bucket_size:
            bucket.append(remaining.pop())
        flat = torch.cat([t.flatten() for t in bucket])
        dist.all_reduce(flat)
        flat /= size()
        for tensor, mean in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(mean.reshape(tensor.shape))
