"""Classifier-free guidance (Ho and Salimans, 2022) on predicted clean latents.

Shapes: B videos, F frames, L tokens, D latent width.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.prediction import Denoiser, predicted_x0
from ardiff.diffusion.solvers import clean_timestep
from ardiff.dit import DiT, TextTokens


def guide(conditional: Tensor, unconditional: Tensor, scale: Tensor | float) -> Tensor:
    """``unconditional + scale * (conditional - unconditional)``; scale 1 is the conditional prediction."""
    return unconditional + scale * (conditional - unconditional)


def guided_denoiser(
    model: DiT,
    diffusion: DiffusionConfig,
    class_labels: Tensor,
    guidance_scale: float | Tensor,
    text: TextTokens | None = None,
    negative_text: Tensor | None = None,
    context: Tensor | None = None,
) -> Denoiser:
    """A function that predicts clean latents with the model, guided towards a class and a text.

    Args:
        class_labels: Of each video or frame, int64 ``(B,)`` or ``(B, F)``.
        guidance_scale: Of all frames, or of each, ``(B, F)``. With 1 the unconditional branch is not evaluated.
        text: Of each video or frame, for a model with text.
        negative_text: The prompt of ``text`` from which guidance leads away, shaped like its index; None is no text.
        context: Clean latents ``(B, F, L, D)`` of the same clips: each noisy frame then sees the clean frames before it
            instead of the noisy ones (teacher forcing).
    """
    alphas_cumprod = diffusion.alphas_cumprod()
    null = model.without_class(class_labels)
    dtype = next(model.parameters()).dtype
    guided = isinstance(guidance_scale, Tensor) or guidance_scale != 1.0
    labels = torch.cat([class_labels, null]) if guided else class_labels  # (B or 2 B, ...)
    if guided and text is not None:
        negative_text = torch.full_like(text.index, -1) if negative_text is None else negative_text
        text = replace(text, index=torch.cat([text.index, negative_text]))

    def of_frames(tensor: Tensor, frames: Tensor | None) -> Tensor:
        return tensor if tensor.ndim == 1 or frames is None else tensor[:, frames]

    def denoise(x: Tensor, timesteps: Tensor, frames: Tensor | None = None) -> Tensor:
        branches = 2 if guided else 1
        x, timesteps = x.repeat(branches, 1, 1, 1), timesteps.repeat(branches, 1)  # (B or 2 B, F, L, D)
        of_text = () if text is None else (replace(text, index=of_frames(text.index, frames)),)
        if context is None:
            output = model(x.to(dtype), timesteps, of_frames(labels, frames), *of_text)
        else:
            clip, levels = with_context(context.repeat(branches, 1, 1, 1), x, timesteps, diffusion)
            output = model(clip.to(dtype), levels, labels, *of_text, teacher_forcing=True)
        output = output.to(x.dtype)
        output = predicted_x0(diffusion.prediction, output, x, timesteps, alphas_cumprod)
        if not guided:
            return output
        scale = guidance_scale
        if isinstance(scale, Tensor):
            scale = of_frames(scale, frames)[..., None, None]  # (B, F, 1, 1)
        conditional, unconditional = output.chunk(2)
        return guide(conditional, unconditional, scale)

    return denoise


def with_context(
    context: Tensor, noisy: Tensor, timesteps: Tensor, diffusion: DiffusionConfig
) -> tuple[Tensor, Tensor]:
    """The input of a model under teacher forcing: clean frames at the timestep of clean frames, then noisy ones.

    Args:
        context, noisy: ``(B, F, L, D)``.
        timesteps: Of the noisy frames, int64 ``(B, F)``.

    Returns:
        Latents ``(B, 2 F, L, D)`` and timesteps ``(B, 2 F)``.
    """
    clean = torch.full_like(timesteps, clean_timestep(diffusion.num_timesteps, 1))
    return torch.cat([context, noisy], dim=1), torch.cat([clean, timesteps], dim=1)
