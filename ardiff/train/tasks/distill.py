"""The student's training task: trajectory distillation under teacher forcing.

A clip's frames are noised together. The teacher denoises them to the end, each frame beside the clean frames before it,
as it will see them when it samples frame after frame. The student learns to jump there in one evaluation, in the same
view. The targets do not depend on the student, as in the distillation of Luhman and Luhman (2021); training pairs of a
causal teacher's trajectories are those of CausVid (Yin et al., 2025, Sec. 4.3).

Shapes: B batch, F frames, L tokens, D latent width, S steps of the teacher.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ardiff.data.latents import LatentStatistics
from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.guidance import guided_denoiser, with_context
from ardiff.diffusion.loss import diffusion_loss, loss_breakdown
from ardiff.diffusion.noise import q_sample
from ardiff.diffusion.prediction import predicted_x0
from ardiff.diffusion.solvers import SolverTable, solver_step, solver_table
from ardiff.diffusion.student import Student
from ardiff.dit import DiT, TextTokens
from ardiff.randomness import BatchGenerator
from ardiff.sampling.params import SamplingParams
from ardiff.train.tasks.base import Batch
from ardiff.train.tasks.config import DistillTaskConfig
from ardiff.train.tasks.dit import DiTTask


@dataclass(frozen=True, slots=True, eq=False)
class Trajectories:
    """Clips of a batch, and where the teacher's trajectories lead from them."""

    clean: Tensor
    """Clean latents ``(B, F, L, D)``."""
    noisy: Tensor
    """The same at the timesteps, ``(B, F, L, D)``."""
    timesteps: Tensor
    """int64 ``(B, F)``, equal in a clip."""
    labels: Tensor
    """Class labels, int64 ``(B,)``."""
    text: TextTokens | None
    ends: Tensor
    """The ends of the trajectories, ``(B, F, L, D)``."""


class DistillTask(DiTTask):
    """Trains a student on batches like those of :class:`~ardiff.train.tasks.dit.DiTTask`."""

    sampling = SamplingParams(mode="full")
    config: DistillTaskConfig

    def __init__(
        self,
        model: DiT,
        teacher: DiT,
        config: DistillTaskConfig,
        diffusion: DiffusionConfig,
        statistics: LatentStatistics,
        decode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """``diffusion`` is that of the student, with ``student`` set; both models predict the same."""
        super().__init__(model, config, diffusion, statistics, decode)
        self.teacher = teacher.eval().requires_grad_(False)
        self.table = teacher_table(config, diffusion)
        self._trajectories: dict[int, Trajectories] = {}  # by the index of the micro-batch's first sample

    def loss(self, batch: Batch, step: int, draws: BatchGenerator) -> tuple[Tensor, dict[str, Tensor]]:
        if step % self.config.trajectory_uses == 0:
            self._trajectories[draws.first] = self.trajectories(batch, draws)
        clips = self._trajectories[draws.first]
        latents, timesteps = with_context(clips.clean, clips.noisy, clips.timesteps, self.diffusion)
        output = self.model(latents, timesteps, clips.labels, clips.text, teacher_forcing=True)  # (B, F, L, D)
        prediction = self.diffusion.prediction
        x0 = predicted_x0(prediction, output.float(), clips.noisy, clips.timesteps, self.alphas_cumprod)
        return diffusion_loss(x0, clips.ends), loss_breakdown(
            x0, clips.ends, clips.timesteps, self.diffusion.num_timesteps
        )

    @torch.no_grad()
    def trajectories(self, batch: Batch, draws: BatchGenerator) -> Trajectories:
        """Noises the clips of a batch, each at a random one of the teacher's timesteps, and follows the teacher."""
        clean = self._clean(batch)  # (B, F, L, D)
        weights = torch.tensor(self.config.start_probabilities)
        starts = draws(len(clean), lambda g: torch.multinomial(weights, 1, generator=g)[0])  # (B,)
        eps = self._noise(clean, draws)  # (B, F, L, D)
        labels = self._labels(batch["label"], draws)  # (B,)
        text = self._text(batch, draws) if self.model.config.text else None
        timesteps = self.table.timesteps[starts].to(clean.device)[:, None].expand(clean.shape[:2])  # (B, F)
        noisy = q_sample(clean, eps, timesteps, self.alphas_cumprod)  # (B, F, L, D)
        self.teacher.to(clean.device)
        ends, history = noisy.clone(), tuple(torch.zeros_like(noisy) for _ in range(self.table.history_size))
        for step in range(int(starts.min()), len(self.table.timesteps)):
            rows = (starts <= step).nonzero().flatten()  # clips whose trajectories have begun, b of them
            of_text = None if text is None else replace(text, index=text.index[rows])
            denoise = guided_denoiser(
                self.teacher, self.diffusion, labels[rows], self.config.guidance, of_text, context=clean[rows]
            )
            index = torch.full((len(rows), clean.shape[1]), step)  # (b, F)
            x0 = denoise(ends[rows], self.table.timesteps[index].to(clean.device), torch.arange(clean.shape[1]))
            begins = (starts[rows] == step).to(clean.device)[:, None, None, None]
            # Without a step before it, a trajectory begins with a step of first order, which x0 as its history gives.
            memory = tuple(torch.where(begins, x0, tensor[rows]) for tensor in history)
            ends[rows], memory = solver_step(ends[rows], x0, memory, index, self.table)
            for tensor, new in zip(history, memory, strict=True):
                tensor[rows] = new
        return Trajectories(clean, noisy, timesteps, labels, text, ends)


def teacher_table(config: DistillTaskConfig, diffusion: DiffusionConfig) -> SolverTable:
    """The solver of the teacher's trajectories."""
    return solver_table(diffusion, config.teacher_steps, config.teacher_solver, config.teacher_spacing)


def evaluations_of_update(config: DistillTaskConfig, num_frames: int) -> tuple[float, float]:
    """Frames that an update evaluates for each clip of ``num_frames`` frames: by the teacher, on average, and by the
    student. Both branches of guidance count."""
    steps = sum(p * (config.teacher_steps - start) for start, p in enumerate(config.start_probabilities))
    branches = 1 if config.guidance == 1.0 else 2
    return branches * 2 * num_frames * steps / config.trajectory_uses, 2.0 * num_frames


def student_of(config: DistillTaskConfig, diffusion: DiffusionConfig) -> Student:
    """What a student trained with ``config`` is made for."""
    timesteps = teacher_table(config, diffusion).timesteps.tolist()
    starts = [t for t, probability in zip(timesteps, config.start_probabilities, strict=False) if probability > 0]
    return Student(timesteps=tuple(starts), num_steps=config.student_steps, guidance=config.guidance)
