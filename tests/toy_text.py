"""A text encoder for tests: one token per word, which depends on the words before it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ardiff.sampling.request import EncodedPrompt

WIDTH = 5


def token_states(text: str) -> Tensor:
    """Float32 ``(words, WIDTH)``."""
    seeds = [sum(word.encode()) for word in text.split()]
    states = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(states).cumsum(dim=0)


def encoded(*texts: str) -> dict[str, EncodedPrompt]:
    """Texts as a request to the engine holds them."""
    return {text: EncodedPrompt.of(token_states(text)) for text in texts}


class ToyEncoder:
    """Like the text encoder of a pipeline. Remembers its calls."""

    def __init__(self, fingerprint: str = "f00d", max_tokens: int = 8, dim: int = WIDTH) -> None:
        self.uri, self.fingerprint, self.max_tokens, self.dim = "toy", fingerprint, max_tokens, dim
        self.calls: list[list[str]] = []

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        self.calls.append(list(texts))
        states = [token_states(text)[: self.max_tokens] for text in texts]
        mask = [torch.ones(len(s), dtype=torch.bool) for s in states]
        return pad_sequence(states, batch_first=True), pad_sequence(mask, batch_first=True)

    def too_long(self, text: str) -> bool:
        return len(text.split()) > self.max_tokens
