"""The training loss, and its breakdown by frame and by timestep.

Shapes: B videos, F frames, L tokens, D latent width.
"""

import itertools

import torch
from torch import Tensor


def diffusion_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all elements, in float32 (Sec. 3.2)."""
    return torch.nn.functional.mse_loss(output.float(), target.float())


def loss_breakdown(
    output: Tensor, target: Tensor, timesteps: Tensor, num_timesteps: int, bins: int = 4
) -> dict[str, Tensor]:
    """The loss of each frame index and of each range of timesteps.

    Args:
        output, target: ``(B, F, L, D)``.
        timesteps: ``(B, F)`` in ``0..num_timesteps - 1``.
        bins: Number of equal ranges of timesteps.

    Returns:
        For each frame (``loss_frame_00``) and each range (``loss_t_000_249``) the sum of its frames' mean squared
        errors and their number, float64 ``(2,)``, to be summed over batches and workers.
    """
    errors = (output.detach().double() - target.detach().double()).square().flatten(2).mean(dim=2)  # (B, F)
    everywhere = torch.ones_like(errors, dtype=torch.bool)
    breakdown = {f"loss_frame_{f:02d}": _sum_and_count(errors[:, f], everywhere[:, f]) for f in range(errors.shape[1])}
    edges = [num_timesteps * i // bins for i in range(bins + 1)]
    for low, high in itertools.pairwise(edges):
        inside = (timesteps >= low) & (timesteps < high)  # (B, F)
        breakdown[f"loss_t_{low:03d}_{high - 1:03d}"] = _sum_and_count(errors, inside)
    return breakdown


def _sum_and_count(errors: Tensor, chosen: Tensor) -> Tensor:
    """Sum and number of the chosen errors, ``(2,)``, of sizes that the values do not decide: a GPU need not wait."""
    return torch.stack([(errors * chosen).sum(), chosen.sum().to(errors.dtype)])
