"""The workers of a run: the ranks of torch's process group, or this process alone if there is none."""

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """The number of this worker, 0-based."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many workers there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over(values: list[float], device: torch.device) -> list[float]:
    """The sums over all workers of a list that is equally long on each, in float64."""
    if size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def max_over(values: list[float], device: torch.device) -> list[float]:
    """The largest over all workers of each of a list that is equally long on each, in float64."""
    if size() == 1:
        return values
    largest = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def average_(tensors: list[Tensor], bucket: int = 2**24) -> None:
    """Replaces tensors by their means over all workers, which must hold the same ones in the same order.

    They travel together in buckets of at most ``bucket`` elements, or of one larger tensor.
    """
    if size() == 1:
        return
    waiting = list(reversed(tensors))
    while waiting:
        members = [waiting.pop()]
        while waiting and sum(t.numel() for t in members) + waiting[-1].numel() <= bucket:
            members.append(waiting.pop())
        flat = torch.cat([t.flatten() for t in members])
        dist.all_reduce(flat)
        flat /= size()
        for tensor, mean in zip(members, flat.split([t.numel() for t in members]), strict=True):
            tensor.copy_(mean.reshape(tensor.shape))
