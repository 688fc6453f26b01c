"""The plain sampler: evaluates every visible frame in every iteration. The reference for every faster one.

Shapes: B batch, F frames, L tokens, D latent width, S sampling steps.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ardiff.diffusion.ad import ADSchedule, inference_timesteps
from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.noise import ddim_coefficients, ddim_step
from ardiff.diffusion.prediction import Denoiser
from ardiff.randomness import torch_generator


def initial_noise(seeds: list[int], num_frames: int, num_tokens: int, token_dim: int) -> Tensor:
    """Standard normal float32 ``(B, F, L, D)`` in which frame f of a video depends on (its seed, f) alone.

    So a video's noise depends neither on its neighbours in the batch nor on the number of frames asked for.
    """
    return torch.stack(
        [torch.stack([frame_noise(s, f, num_tokens, token_dim) for f in range(num_frames)]) for s in seeds]
    )


def frame_noise(seed: int, frame: int, num_tokens: int, token_dim: int) -> Tensor:
    """The noise that one frame of a video starts from: float32 ``(L, D)``."""
    return torch.randn(num_tokens, token_dim, generator=torch_generator("initial noise", seed, frame))


def sample_full(
    denoise: Denoiser,
    noise: Tensor,
    schedule: ADSchedule,
    diffusion: DiffusionConfig,
    condition: Tensor | None = None,
) -> Tensor:
    """Clean latents ``(B, F, L, D)``: all that :func:`stream_full` yields."""
    return torch.cat(list(stream_full(denoise, noise, schedule, diffusion, condition)), dim=1)


@torch.no_grad()
def stream_full(
    denoise: Denoiser,
    noise: Tensor,
    schedule: ADSchedule,
    diffusion: DiffusionConfig,
    condition: Tensor | None = None,
) -> Iterator[Tensor]:
    """Denoises ``noise`` by the schedule with deterministic DDIM steps (Sec. 3.4).

    Args:
        denoise: Predicts clean latents of the visible frames.
        noise: ``(B, F, L, D)``.
        schedule: Its ``window``, if any, says which frames the denoiser sees; it sees them as a clip of their own.
        diffusion: Gives the timesteps and the coefficients of the steps.
        condition: Clean latents ``(B, C, L, D)`` of the first frames, for a schedule with ``num_given`` C.

    Yields:
        Clean latents ``(B, n, L, D)`` of the n frames that an iteration finished, first of all the given ones. A frame
        that makes no step in an iteration stays as it is to the last bit.
    """
    num_steps = int(schedule.step_index.max())
    template = inference_timesteps(diffusion.num_timesteps, num_steps)
    x_factor, x0_factor = ddim_coefficients(template, diffusion.alphas_cumprod())
    template = torch.cat([torch.tensor([diffusion.num_timesteps - 1]), template])  # index 0: a frame still at noise
    x, final = noise.clone(), 0
    if condition is not None:
        final = condition.shape[1]
        x[:, :final] = condition
        yield x[:, :final].clone()
    for n, (index, update) in enumerate(zip(schedule.step_index, schedule.update, strict=True)):
        start, end = (0, x.shape[1]) if schedule.window is None else schedule.window[n].tolist()
        seen, k = x[:, start:end], index[start:end].expand(len(x), -1)  # (B, W, L, D), (B, W)
        x0 = denoise(seen, template[k].to(x.device))
        stepped = ddim_step(seen, x0, (k - 1).clamp(min=0), x_factor, x0_factor)
        moves = update[start:end, None, None].to(x.device)
        x[:, start:end] = torch.where(moves, stepped, seen)
        before, final = final, int((index == num_steps).sum())
        if final > before:
            yield x[:, before:final].clone()
