"""Condition tokens: a class as tokens before the first frame, which every frame reads.

Shapes: B batch, F frames, L tokens a frame, N condition tokens, K their width, C model width.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ardiff.dit.config import DiTConfig


class ConditionTokens(nn.Module):
    """N learned tokens per class, projected to the model's width.

    Row ``num_classes`` of the table is a video without a class. The label ``num_classes + 1`` stands for tokens that
    are zero; the projection's bias remains of them.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.dim = config.condition_dim
        table = None
        if config.condition_tokens:
            shape = (config.num_classes + 1, config.condition_tokens, config.condition_dim)
            table = nn.Parameter(0.1 * torch.randn(shape))
        self.register_parameter("table", table)
        self.table: nn.Parameter | None
        self.project = nn.Linear(config.condition_dim, config.width)

    def forward(self, condition: Tensor) -> Tensor:
        """Class labels, int64 ``(B,)``, or condition tokens, float ``(B, N, K)`` -> ``(B, N, C)``.

        Raises:
            ValueError: Labels for a model without tokens of its own, or tokens of another width.
        """
        if condition.is_floating_point():
            if condition.ndim != 3 or condition.shape[2] != self.dim:
                raise ValueError(f"condition tokens must be (B, N, {self.dim}), got {tuple(condition.shape)}")
            return self.project(condition)
        if self.table is None:
            raise ValueError("the model has no condition tokens of its own (condition_tokens=0): give them")
        zero = condition >= len(self.table)
        tokens = self.table[condition.clamp(max=len(self.table) - 1)]  # (B, N, K)
        return self.project(tokens.masked_fill(zero[:, None, None], 0.0))


def unmodulated_before(modulation: Tensor, num_condition: int, num_tokens: int) -> Tensor:
    """A block's modulation of each frame, ``(B, F, 6 C)``, as one of each token, ``(B, N + F L, 6 C)``.

    The N condition tokens before the frames are neither shifted nor scaled, and their gates are open.
    """
    neutral = modulation.new_tensor([0.0, 0.0, 1.0, 0.0, 0.0, 1.0])  # shift, scale, gate of attention and of MLP
    width = modulation.shape[2] // len(neutral)
    neutral = repeat(neutral, "six -> b n (six c)", b=len(modulation), n=num_condition, c=width)
    frames = repeat(modulation, "b f m -> b f l m", l=num_tokens)
    return torch.cat([neutral, rearrange(frames, "b f l m -> b (f l) m")], dim=1)
