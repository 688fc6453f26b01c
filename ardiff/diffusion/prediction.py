"""What a model predicts, and the clean latents that its output stands for.

Shapes: B videos, F frames, L tokens, D latent width, T timesteps. Latents ``(B, F, L, D)``; timesteps int64 ``(B, F)``;
``alphas_cumprod`` float64 ``(T,)``.
"""

from collections.abc import Callable

from torch import Tensor

from ardiff.diffusion import noise
from ardiff.diffusion.config import Prediction

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Takes noisy latents ``(B, F, L, D)``, timesteps ``(B, F)`` and the indices of the frames in the video, int64
``(F,)``; returns predicted clean latents ``(B, F, L, D)``."""


def prediction_target(
    prediction: Prediction, x0: Tensor, eps: Tensor, x_t: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """The target of the model's output for ``x_t``, which Eq. 2 made from ``x0`` and ``eps``; same shape."""
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
    """The clean latents that the model's ``output`` for ``x_t`` stands for; same shape."""
    match prediction:
        case "x0":
            return output
        case "eps":
            return noise.x0_from_eps(x_t, output, timesteps, alphas_cumprod)
        case "v":
            return noise.x0_from_v(x_t, output, timesteps, alphas_cumprod)
        case _:
            raise ValueError(f"unknown prediction {prediction!r}")
