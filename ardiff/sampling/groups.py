"""The attention of all running requests, in groups that share calls.

Shapes: N packed frames evaluated now, H heads, L tokens per frame, K head width.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ardiff.layers import Attend
from ardiff.sampling.attention import RequestAttention
from ardiff.sampling.cache import FrameCache, Frames
from ardiff.sampling.config import AttentionBackend
from ardiff.sampling.stack import StackedAttention


class Attention(Protocol):
    """Attention of the frames that an iteration evaluates to those in the caches of one or more requests."""

    def prepare(self, frames: Sequence[Frames]) -> int:
        """Sets the frames that the next calls evaluate, for each request. All before them must be in its cache.

        Returns N, how many they are over all sequences.
        """

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores the keys and values of the frames, then attends to all frames that each of them may see.

        Args:
            layer: Index of the block.
            q, k, v: ``(N, H, L, K)``, one request after another, each of them frame by frame.

        Returns:
            ``(N, H, L, K)``.
        """


class AttentionGroups:
    """Requests with caches of equal capacity are a group with the backend ``stacked``; else each is one by itself."""

    def __init__(self, backend: AttentionBackend) -> None:
        self.backend = backend
        self._groups: dict[tuple[int, ...], Attention] = {}

    def set_requests(self, caches: Mapping[int, FrameCache]) -> None:
        """Sets the requests, by their ids. Frees what only others needed."""
        groups = dict[int, list[int]]()
        for request_id, cache in caches.items():
            groups.setdefault(cache.capacity if self.backend == "stacked" else request_id, []).append(request_id)
        wanted = [tuple(group) for group in groups.values()]
        self._groups = {ids: self._groups[ids] for ids in wanted if ids in self._groups}  # frees before it allocates
        for ids in wanted:
            if ids not in self._groups:
                self._groups[ids] = self._make([caches[request_id] for request_id in ids])

    def remove(self, request_id: int) -> None:
        """Removes the group of a request. Allocates nothing, so that it also works after a failure for lack of memory.

        What others shared with it stays until :meth:`set_requests` groups them again.
        """
        self._groups = {ids: group for ids, group in self._groups.items() if request_id not in ids}

    def _make(self, caches: list[FrameCache]) -> Attention:
        return StackedAttention(caches) if self.backend == "stacked" else RequestAttention(caches[0], self.backend)

    @property
    def order(self) -> list[int]:
        """The requests in the order in which their frames are packed."""
        return list(itertools.chain.from_iterable(self._groups))

    def of_blocks(self, frames: Sequence[Frames], depth: int) -> list[Attend]:
        """For each of ``depth`` blocks, attention of the frames of all requests, which are given in their order."""
        remaining, groups = iter(frames), list(self._groups.values())
        sizes = [group.prepare(list(itertools.islice(remaining, len(ids)))) for ids, group in self._groups.items()]

        def of_block(layer: int) -> Attend:
            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                chunks = zip(groups, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
                outputs = [group.attend(layer, *chunk) for group, *chunk in chunks]
                return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

            return attend

        return [of_block(layer) for layer in range(depth)]
