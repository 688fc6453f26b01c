"""The diffusion process as configuration: noise schedule, prediction target, training law, and the losses they give.

Shapes: B batch, F frames, L tokens, D latent width, T timesteps.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ardiff.diffusion import noise
from ardiff.diffusion.timestep_sampling import TimestepLaw

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""Takes noisy latents ``(B, F, L, D)`` and timesteps ``(B, F)``, returns predicted clean latents ``(B, F, L, D)``."""

Prediction = Literal["x0", "eps", "v"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionConfig:
    """The noise schedule and what the model is trained to predict (Sec. 3.2, Table 6)."""

    num_timesteps: int = 1000
    """T."""
    beta_start: float = 1e-4
    """First variance of the schedule."""
    beta_end: float = 0.02
    """Last variance; see :func:`ardiff.diffusion.noise.betas` for the misprint in Table 6."""
    prediction: Prediction = "x0"
    """Target of the model: clean latents, noise, or velocity."""
    timestep_law: TimestepLaw = "fopp"
    """How training draws the timesteps of a clip's frames."""

    def __post_init__(self) -> None:
        noise.betas(self.num_timesteps, self.beta_start, self.beta_end)

    def alphas_cumprod(self) -> Tensor:
        """float64 ``(T,)``."""
        return noise.alphas_cumprod(noise.betas(self.num_timesteps, self.beta_start, self.beta_end))


def prediction_target(
    prediction: Prediction, x0: Tensor, eps: Tensor, x_t: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """What the model has to output for ``x_t``, made of ``x0`` and ``eps`` by Eq. 2; same shape."""
    match prediction:
        case "x0":
            return x0
        case "eps":
            return eps
        case "v":
            return noise.v_from_x0(x_t, x0, timesteps, alphas_cumprod)
        case _:
            raise ValueError(f"unknown prediction {prediction!r}")


def predicted_x0(
    prediction: Prediction, output: Tensor, x_t: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """The clean latents that the model's ``output`` stands for; same shape."""
    match prediction:
        case "x0":
            return output
        case "eps":
            return noise.x0_from_eps(x_t, output, timesteps, alphas_cumprod)
        case "v":
            return noise.x0_from_v(x_t, output, timesteps, alphas_cumprod)
        case _:
            raise ValueError(f"unknown prediction {prediction!r}")


def diffusion_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all elements, in float32 (Sec. 3.2)."""
    return torch.nn.functional.mse_loss(output.float(), target.float())


def loss_breakdown(
    output: Tensor, target: Tensor, timesteps: Tensor, num_timesteps: int, bins: int = 4
) -> dict[str, Tensor]:
    """Where the loss lies, along time and along noise.

    Args:
        output, target: ``(B, F, L, D)``.
        timesteps: ``(B, F)`` in ``0..num_timesteps - 1``.
        bins: Into how many equal ranges of timesteps it is parted.

    Returns:
        For each frame (``loss_frame_00``) and each range (``loss_t_000_249``) the sum of the mean squared errors of the
        frames concerned and their number, float64 ``(2,)``, ready to be added up over batches and workers.
    """
    errors = (output.detach().double() - target.detach().double()).square().flatten(2).mean(dim=2)  # (B, F)
    found = {f"loss_frame_{f:02d}": _sum_and_count(errors[:, f]) for f in range(errors.shape[1])}
    edges = [num_timesteps * i // bins for i in range(bins + 1)]
    for low, high in itertools.pairwise(edges):
        inside = (timesteps >= low) & (timesteps < high)
        found[f"loss_t_{low:03d}_{high - 1:03d}"] = _sum_and_count(errors[inside])
    return found


def _sum_and_count(errors: Tensor) -> Tensor:
    return torch.stack([errors.sum(), errors.new_tensor(float(errors.numel()))])
