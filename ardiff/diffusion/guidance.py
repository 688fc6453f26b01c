"""Classifier-free guidance (Ho and Salimans, 2022) on predicted clean latents.

Shapes: B videos, F frames, L tokens, D latent width.
"""

import torch
from torch import Tensor

from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.prediction import Denoiser, predicted_x0
from ardiff.dit import DiT


def guide(conditional: Tensor, unconditional: Tensor, scale: Tensor | float) -> Tensor:
    """``unconditional + scale * (conditional - unconditional)``; scale 1 is the conditional prediction."""
    return unconditional + scale * (conditional - unconditional)


def guided_denoiser(model: DiT, diffusion: DiffusionConfig, class_labels: Tensor, guidance_scale: float) -> Denoiser:
    """A function that predicts clean latents with the model, guided towards ``class_labels (B,)``.

    With ``guidance_scale`` 1 the unconditional branch is not evaluated.
    """
    alphas_cumprod = diffusion.alphas_cumprod()
    null = torch.full_like(class_labels, model.null_class)
    dtype = next(model.parameters()).dtype

    def predict(x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        output = model(x.to(dtype), timesteps, labels).to(x.dtype)  # (B, F, L, D)
        return predicted_x0(diffusion.prediction, output, x, timesteps, alphas_cumprod)

    def denoise(x: Tensor, timesteps: Tensor) -> Tensor:
        if guidance_scale == 1.0:
            return predict(x, timesteps, class_labels)
        both = predict(x.repeat(2, 1, 1, 1), timesteps.repeat(2, 1), torch.cat([class_labels, null]))  # (2 B, F, L, D)
        conditional, unconditional = both.chunk(2)
        return guide(conditional, unconditional, guidance_scale)

    return denoise
