"""Conditions: tokens before the first frame, which every frame sees, and text, which every block reads.

Shapes: B videos, F frames, L tokens per frame, M condition or text tokens, E their width, C model width, P prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ardiff.dit.config import DiTConfig


class ConditionTokens(nn.Module):
    """M learned tokens per class, projected to the model's width. Index ``num_classes`` is the null class."""

    table: nn.Parameter | None

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.dim = config.condition_dim
        table = None
        if config.condition_tokens:
            shape = (config.num_classes + 1, config.condition_tokens, config.condition_dim)
            table = nn.Parameter(0.1 * torch.randn(shape))
        self.register_parameter("table", table)
        self.project = nn.Linear(config.condition_dim, config.width)

    def forward(self, condition: Tensor) -> Tensor:
        """Class labels, int64 ``(B,)``, or condition tokens, float ``(B, M, E)`` -> ``(B, M, C)``.

        Raises:
            ValueError: Labels for a model without condition tokens of its own, or tokens of another width.
        """
        if condition.is_floating_point():
            if condition.ndim != 3 or condition.shape[2] != self.dim:
                raise ValueError(f"condition tokens must be (B, M, {self.dim}), got {tuple(condition.shape)}")
            return self.project(condition)
        if self.table is None:
            raise ValueError("the model has no condition tokens of its own (condition_tokens=0): pass them")
        return self.project(self.look_up(self.table, condition))

    def look_up(self, table: Tensor, labels: Tensor) -> Tensor:
        """Rows ``(B, M, E)`` of ``table (classes + 1, M, E)`` for class labels ``(B,)``."""
        return table[labels]


def neutral_modulation(like: Tensor, width: int) -> Tensor:
    """The modulation of condition tokens, ``(6 C,)``: shift 0, scale 0 and gate 1, of attention and of MLP."""
    return repeat(like.new_tensor([0.0, 0.0, 1.0, 0.0, 0.0, 1.0]), "six -> (six c)", c=width)


def modulate_frames_only(modulation: Tensor, num_condition: int, num_tokens: int) -> Tensor:
    """Expands a block's modulation from frames, ``(B, F, 6 C)``, to tokens, ``(B, M + F L, 6 C)``.

    The M condition tokens before the frames get the neutral one.
    """
    neutral = neutral_modulation(modulation, modulation.shape[2] // 6)
    neutral = repeat(neutral, "c -> b m c", b=len(modulation), m=num_condition)
    frames = repeat(modulation, "b f m -> b f l m", l=num_tokens)
    return torch.cat([neutral, rearrange(frames, "b f l m -> b (f l) m")], dim=1)


@dataclass(frozen=True, slots=True, eq=False)
class TextTokens:
    """Token states of distinct prompts, and the prompt of each video or frame."""

    states: Tensor
    """``(P, M, E)`` from the text encoder, padded."""
    mask: Tensor
    """bool ``(P, M)``: True for a token, False for padding. Every prompt has at least one token."""
    index: Tensor
    """int64 ``(B,)`` or ``(B, F)``: the prompt of each video or frame; -1 is no text."""

    @classmethod
    def of_videos(cls, states: Tensor, mask: Tensor, dropped: Tensor) -> TextTokens:
        """A prompt per video: ``states (B, M, E)``, ``mask (B, M)``. A video whose mask is all False, or which is
        ``dropped`` (bool ``(B,)``), has no text."""
        index = torch.arange(len(states), device=states.device)
        return cls(states, mask, torch.where(dropped | ~mask.any(dim=1), -1, index))


class TextEmbedder(nn.Module):
    """Projects token states to the model's width with a two-layer MLP. A learned token stands for no text."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.dim = config.condition_dim
        self.null = nn.Parameter(torch.randn(config.condition_dim))
        self.norm = nn.LayerNorm(config.condition_dim, elementwise_affine=False)  # encoders differ in scale
        self.fc1 = nn.Linear(config.condition_dim, config.width)
        self.fc2 = nn.Linear(config.width, config.width)

    def forward(self, states: Tensor | None) -> Tensor:
        """Token states ``(P, M, E) -> (P, M, C)``; None is no text, ``(1, 1, C)``.

        Raises:
            ValueError: States of another width.
        """
        if states is None:
            states = rearrange(self.null, "e -> 1 1 e")
        elif states.ndim != 3 or states.shape[2] != self.dim:
            raise ValueError(f"text must be token states (P, M, {self.dim}), got {tuple(states.shape)}")
        x = self.norm(states.to(self.fc1.weight.dtype))
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))
