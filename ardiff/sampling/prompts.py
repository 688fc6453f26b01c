"""Tables of the keys and values of prompts in all blocks, which depend on no frame, and attention to them.

Shapes: M text tokens, N packed frames, H heads, L tokens per frame, K head width.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ardiff.dit import DiT
from ardiff.layers import AttendText
from ardiff.sampling.request import NO_TEXT, EncodedPrompt, PromptKey, SampleRequest
from ardiff.sampling.tables import SharedTables
from ardiff.tensors import to_device

KeysValues = list[tuple[Tensor, Tensor]]
"""Keys and values of a prompt in each block, ``(1, H, M, K)`` each."""


class PromptTables(SharedTables[PromptKey, KeysValues]):
    """The keys and values of each distinct prompt, computed once; frames, sequences and requests share them."""

    def __init__(self, model: DiT) -> None:
        super().__init__()
        self.model = model
        self._last: tuple[Sequence[PromptKey], list[tuple[PromptKey, Tensor]]] = ((), [])

    def prepare(self, request: SampleRequest) -> None:
        """Computes the keys and values of a request's prompts that no other request had."""
        by_key: dict[PromptKey, EncodedPrompt] = {prompt.key: prompt for prompt in request.prompts.values()}
        weight = next(self.model.parameters())
        for key in self.keys_of([request]):
            if key not in self._tables:
                states = None if key == NO_TEXT else by_key[key].states[None].to(weight.device)  # (1, M, E)
                self._tables[key] = self.model.text_keys_values(states)

    def keys_of(self, requests: Iterable[SampleRequest]) -> set[PromptKey]:
        """The prompts of requests, no text included; none for a model without text."""
        if not self.model.config.text:
            return set()
        return {key for request in requests for start in request.starts for key in request.prompt_keys(start)}

    def num_bytes(self, keys: Iterable[PromptKey]) -> int:
        config, size = self.model.config, next(self.model.parameters()).dtype.itemsize
        return sum(2 * config.depth * key.num_tokens * config.width * size for key in keys)

    def attention(self, rows: Sequence[PromptKey]) -> list[AttendText]:
        """For each block, attention of N packed frames to their prompts: one call per distinct prompt, in which frames
        are a batch. So a frame's result depends on its own prompt only, on CPUs to the last bit.

        Args:
            rows: The prompt of each frame, prepared before.
        """
        if self._last[0] != rows:
            device, index = next(self.model.parameters()).device, dict[PromptKey, list[int]]()
            for row, key in enumerate(rows):
                index.setdefault(key, []).append(row)
            self._last = rows, [(key, to_device(torch.tensor(of_key), device)) for key, of_key in index.items()]
        groups = [(self._tables[key], index) for key, index in self._last[1]]

        def of_block(block: int) -> AttendText:
            def attend(q: Tensor) -> Tensor:
                if len(groups) == 1:
                    return _attend(q, *groups[0][0][block])
                mixed = torch.empty_like(q)
                for table, index in groups:
                    mixed[index] = _attend(q[index], *table[block])
                return mixed

            return attend

        return [of_block(block) for block in range(self.model.config.depth)]


def _attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Queries ``(N, H, L, K)`` of frames that share the keys and values ``(1, H, M, K)``."""
    keys, values = (tensor.expand(len(q), -1, -1, -1) for tensor in (keys, values))
    return nn.functional.scaled_dot_product_attention(q, keys, values)
