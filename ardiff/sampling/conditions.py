"""Tables of the keys and values of condition tokens in all blocks, which depend on no frame.

Shapes: M condition tokens, H heads, K head width.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ardiff.dit import DiT
from ardiff.sampling.request import SampleRequest
from ardiff.sampling.tables import SharedTables


class ConditionTables(SharedTables[int, list[tuple[Tensor, Tensor]]]):
    """For each class label as the model takes it, keys and values ``(1, H, M, K)`` in each block; requests share them.

    They hold for a whole video. The cache of a request has copies of them before its frames.
    """

    def __init__(self, model: DiT) -> None:
        super().__init__()
        self.model = model

    def prefix(self, request: SampleRequest) -> list[tuple[Tensor, Tensor]] | None:
        """For each block, those of the request's sequences, ``(B, H, M, K)``; None without condition tokens."""
        if not self.model.config.prefix_tokens:
            return None
        device = next(self.model.parameters()).device
        for label in self.keys_of([request]) - self._tables.keys():
            self._tables[label] = self.model.condition_keys_values(torch.tensor([label], device=device))
        tables = [self._tables[label] for label in request.labels(self.model)]
        return [
            (torch.cat([keys for keys, _ in of_block]), torch.cat([values for _, values in of_block]))
            for of_block in zip(*tables, strict=True)
        ]

    def keys_of(self, requests: Iterable[SampleRequest]) -> set[int]:
        """The labels of requests; none for a model without condition tokens."""
        if not self.model.config.prefix_tokens:
            return set()
        return {label for request in requests for label in request.labels(self.model)}

    def num_bytes(self, keys: Iterable[int]) -> int:
        config, size = self.model.config, next(self.model.parameters()).dtype.itemsize
        return len(list(keys)) * 2 * config.depth * config.prefix_tokens * config.width * size
