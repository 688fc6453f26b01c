"""The authors' AR-DiT.

Shapes: B videos, N packed frames, L tokens per frame, D latent width, C model width, Q tokens of all frames,
M condition tokens, E their width, H heads, K head width.
"""

import torch
from torch import Tensor, nn

from ardiff.dit.blocks import DiTBlock, FinalLayer, modulate
from ardiff.dit.condition import ConditionTokens
from ardiff.dit.config import DiTConfig
from ardiff.dit.model import DiT
from ardiff.upstream.config import UpstreamDiTConfig


class NormedBlock(DiTBlock):
    """A block in which each norm replaces the residual stream, instead of being a branch of it."""

    def after_attention(
        self, x: Tensor, mixed: Tensor, gate1: Tensor, shift: Tensor, scale: Tensor, gate2: Tensor
    ) -> Tensor:
        """Adds the attention's output to the normed ``x (N, L, C)``, then the MLP's: ``(N, L, C)``."""
        x = torch.addcmul(self.norm1(x), gate1, self.attention.merge(mixed))  # (N, L, C)
        x = self.norm2(x)  # (N, L, C)
        return torch.addcmul(x, gate2, self.mlp(modulate(x, shift, scale)))  # (N, L, C)


class PlainFinalLayer(FinalLayer):
    """The final norm without modulation, and the projection to latents."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.modulation_width = 0
        self.modulation = NoModulation()

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """``x (N, L, C)``, ``modulation (N, 1, 0)`` -> ``(N, L, D)``."""
        return self.project(self.norm(x))


class NoModulation(nn.Module):
    """``(N, C) -> (N, 0)``."""

    def forward(self, condition: Tensor) -> Tensor:
        return condition[:, :0]


class UpstreamConditionTokens(ConditionTokens):
    """Condition tokens with one more label: ``num_classes + 1`` stands for tokens that are zero before projection."""

    def look_up(self, table: Tensor, labels: Tensor) -> Tensor:
        """Rows ``(B, M, E)`` of ``table (classes + 1, M, E)`` for class labels ``(B,)``, or zeros."""
        zero = labels >= len(table)  # (B,)
        return table[labels.clamp(max=len(table) - 1)].masked_fill(zero[:, None, None], 0.0)


class UpstreamDiT(DiT):
    """The AR-DiT as the authors' checkpoints need it.

    It differs from :class:`DiT` in its residual stream, its final layer, its positions (weights instead of constants),
    its null class, and in that condition tokens may see the frames.
    """

    block_class = NormedBlock
    final_layer_class = PlainFinalLayer
    condition_class = UpstreamConditionTokens
    config: UpstreamDiTConfig

    def __init__(self, config: UpstreamDiTConfig) -> None:
        super().__init__(config)
        positions = self.position_embedding
        del self.position_embedding
        self.position_embedding = nn.Parameter(positions)

    @property
    def null_class(self) -> int:
        """The class label that means "no class" in guidance: zero condition tokens, or class 0."""
        match self.config.guidance_null:
            case "zero":
                return self.config.num_classes + 1
            case "first_class":
                return 0

    @property
    def unlabelled(self) -> int:
        """The class label with which a video without a class is generated.

        With ``guidance_null=zero`` it has condition tokens of its own, and guidance leads away from the zero tokens.
        """
        return self.config.num_classes if self.config.guidance_null == "zero" else self.null_class

    def condition_mask(self, mask: Tensor, num_condition: int) -> Tensor:
        """The mask of a sequence that starts with M condition tokens, ``(Q, Q) -> (M + Q, M + Q)``."""
        mask = super().condition_mask(mask, num_condition)
        if self.config.condition_attention == "all":
            mask[:num_condition] = True
        return mask
