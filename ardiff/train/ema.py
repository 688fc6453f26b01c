"""Exponential moving average of a model's parameters, kept apart from them."""

import torch
from torch import Tensor, nn


class EMA:
    """Averages all parameters in float32: ``average <- decay * average + (1 - decay) * parameter``.

    The decay rises as ``(1 + n) / (10 + n)`` over the first updates, so that a short run is not held back by the
    random start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.average = {n: p.detach().float().clone() for n, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Moves the average towards the parameters after ``step`` (0-based) has been made."""
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = [p.detach().float() for _, p in model.named_parameters()]
        torch._foreach_lerp_(list(self.average.values()), parameters, 1.0 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name, float32."""
        return self.average

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Overwrites the averages; the names must be the model's."""
        for name, average in self.average.items():
            average.copy_(state[name])
