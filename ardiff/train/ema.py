"""Exponential moving average (EMA) of a model's trainable parameters."""

import torch
from torch import nn

from ardiff.tensors import trainable


def ema_decay_at(step: int, decay: float) -> float:
    """The decay at ``step`` (0-based): ``(1 + step) / (10 + step)``, at most ``decay``.

    The lower decay at the start keeps the random initial weights from lasting in the EMA of a short run.
    """
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """Keeps ``weights <- decay * weights + (1 - decay) * parameters`` in float32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.weights = {n: p.detach().float().clone() for n, p in trainable(model).items()}
        """By parameter name."""

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Moves the EMA towards the parameters after ``step`` (0-based)."""
        parameters = [p.detach().float() for p in trainable(model).values()]
        torch._foreach_lerp_(list(self.weights.values()), parameters, 1.0 - ema_decay_at(step, self.decay))
