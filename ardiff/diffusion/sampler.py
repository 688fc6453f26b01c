"""The reference sampler: evaluates every visible frame in every iteration. Faster samplers are tested against it.

Shapes: B videos, F frames, W visible frames, L tokens, D latent width, S sampling steps.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ardiff.diffusion.ad import ADSchedule
from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.prediction import Denoiser
from ardiff.diffusion.solver_names import Solver, TimestepSpacing
from ardiff.diffusion.solvers import model_timesteps, solver_step, solver_table
from ardiff.randomness import torch_generator


def initial_noise(seeds: list[int], num_frames: int, num_tokens: int, token_dim: int, step: int = 0) -> Tensor:
    """Standard normal noise, float32 ``(B, F, L, D)``. Frame f of a video depends only on the video's seed and f.

    So the noise of a video depends neither on the rest of the batch nor on its number of frames. ``step`` is that of
    :func:`frame_noise`.
    """
    return torch.stack(
        [torch.stack([frame_noise(s, f, num_tokens, token_dim, step) for f in range(num_frames)]) for s in seeds]
    )


def frame_noise(seed: int, frame: int, num_tokens: int, token_dim: int, step: int = 0) -> Tensor:
    """The initial noise of one frame of a video, float32 ``(L, D)``; with ``step`` that which the solver ``lcm`` adds
    before this step, 1 to S - 1."""
    key = ("initial noise", seed, frame) if step == 0 else ("noise of a step", seed, frame, step)
    return torch.randn(num_tokens, token_dim, generator=torch_generator(*key))


def sample_full(
    denoise: Denoiser,
    noise: Tensor,
    schedule: ADSchedule,
    diffusion: DiffusionConfig,
    condition: Tensor | None = None,
    solver: Solver = "ddim",
    timestep_spacing: TimestepSpacing = "leading",
    later_noise: Sequence[Tensor] = (),
) -> Tensor:
    """All frames of :func:`stream_full`, clean latents ``(B, F, L, D)``."""
    frames = stream_full(denoise, noise, schedule, diffusion, condition, solver, timestep_spacing, later_noise)
    return torch.cat(list(frames), dim=1)


@torch.no_grad()
def stream_full(
    denoise: Denoiser,
    noise: Tensor,
    schedule: ADSchedule,
    diffusion: DiffusionConfig,
    condition: Tensor | None = None,
    solver: Solver = "ddim",
    timestep_spacing: TimestepSpacing = "leading",
    later_noise: Sequence[Tensor] = (),
    on_step: Callable[[int], None] = lambda iteration: None,
) -> Iterator[Tensor]:
    """Denoises ``noise`` along the schedule (Sec. 3.4) with the steps of a solver, DDIM by default.

    Args:
        denoise: Predicts the clean latents of the visible frames.
        noise: ``(B, F, L, D)``.
        schedule: If it has a ``window``, the denoiser sees its frames, and the sink's, as a clip of their own.
        diffusion: Gives the noise level of each timestep.
        condition: Clean latents ``(B, num_given, L, D)`` of given first frames; the schedule's ``num_given``.
        solver, timestep_spacing: See :mod:`ardiff.diffusion.solvers`. Each frame has its own history.
        later_noise: For ``lcm``: the noise that it adds before each of the steps 1 to S - 1, shaped like ``noise``.
        on_step: Called after each iteration with its index.

    Yields:
        Clean latents ``(B, n, L, D)`` of the n frames that became final; first the given frames, if any. A frame that
        makes no step in an iteration stays bitwise equal.
    """
    num_steps = int(schedule.step_index.max())
    table = solver_table(diffusion, num_steps, solver, timestep_spacing)
    timesteps = model_timesteps(diffusion, num_steps, timestep_spacing)  # the last one is that of clean frames
    timesteps = torch.cat([torch.tensor([diffusion.num_timesteps - 1]), timesteps])  # index 0 is noise
    x, final = noise.clone(), 0
    history = tuple(torch.zeros_like(x) for _ in range(table.history_size))  # (B, F, L, D) each
    if solver == "lcm":
        history = tuple(eps.to(x) for _, eps in zip(history, later_noise, strict=True))
    if condition is not None:
        final = condition.shape[1]
        x[:, :final] = condition
        yield x[:, :final].clone()
    for n, (index, update) in enumerate(zip(schedule.step_index, schedule.update, strict=True)):
        frames = schedule.visible(n)  # (W,)
        level = torch.where((index == num_steps) & ~update, len(timesteps) - 1, index)  # (F,)
        visible, *remembered = (tensor[:, frames] for tensor in (x, *history))  # (B, W, L, D) each
        k = index[frames].expand(len(x), -1)  # (B, W)
        x0 = denoise(visible, timesteps[level[frames]].expand(len(x), -1).to(x.device), frames)  # (B, W, L, D)
        denoised, remembers = solver_step(
            visible, x0, tuple(remembered), (k - 1).clamp(min=0), table
        )  # (B, W, L, D) each
        moves = update[frames, None, None].to(x.device)  # (W, 1, 1)
        for state, new in zip((x, *history), (denoised, *remembers), strict=True):
            state[:, frames] = torch.where(moves, new, state[:, frames])
        on_step(n)
        already_final, final = final, int((index == num_steps).sum())
        if final > already_final:
            yield x[:, already_final:final].clone()
