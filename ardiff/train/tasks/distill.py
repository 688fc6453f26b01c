"""The student's training task: trajectory distillation under teacher forcing.

A clip's frames are noised together. The teacher denoises them to the end, each frame beside the clean frames before it,
as it will see them when it samples frame after frame. The student learns to jump there in one evaluation, in the same
view. The targets do not depend on the student, as in the distillation of Luhman and Luhman (2021); training pairs of a
causal teacher's trajectories are those of CausVid (Yin et al., 2025, Sec. 4.3).

Shapes: B batch, F frames, L tokens, D latent width, K further first frames per clip.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from einops import rearrange
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
from ardiff.tensors import to_device
from ardiff.train.tasks.base import Batch
from ardiff.train.tasks.config import DistillTaskConfig
from ardiff.train.tasks.dit import DiTTask, repeated


@dataclass(frozen=True, slots=True, eq=False)
class Trajectories:
    """Noisy frames, and where the teacher's trajectories lead from them."""

    context: Tensor | None
    """Clean latents of the same clips, ``(B, F, L, D)``; None for clips of one frame, which sees no other."""
    noisy: Tensor
    """``(B, F, L, D)``."""
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
        self.checkpoint_interval = config.trajectory_uses
        self.teacher = teacher.eval().requires_grad_(False)
        self.table = teacher_table(config, diffusion)
        # By the index of the micro-batch's first sample.
        self._trajectories: dict[int, tuple[Trajectories, ...]] = {}

    def kind_of(self, step: int) -> int:
        return int(step % self.config.trajectory_uses == 0)

    def loss(self, batch: Batch, step: int, draws: BatchGenerator) -> tuple[Tensor, dict[str, Tensor]]:
        if step % self.config.trajectory_uses == 0:
            self._trajectories[draws.first] = self.trajectories(batch, draws)
        clips, *first = self._trajectories[draws.first]
        x0 = self._predict(clips)  # (B, F, L, D)
        loss = diffusion_loss(x0, clips.ends)
        logged = loss_breakdown(x0, clips.ends, clips.timesteps, self.diffusion.num_timesteps)
        for frames in first:
            logged["loss_first_frames"] = diffusion_loss(self._predict(frames), frames.ends)
            loss = loss + logged["loss_first_frames"]
        return loss, logged

    def _predict(self, clips: Trajectories) -> Tensor:
        """The student's clean latents, ``(B, F, L, D)``."""
        if clips.context is None:
            output = self.model(clips.noisy, clips.timesteps, clips.labels, clips.text)
        else:
            latents, timesteps = with_context(clips.context, clips.noisy, clips.timesteps, self.diffusion)
            output = self.model(latents, timesteps, clips.labels, clips.text, teacher_forcing=True)
        prediction = self.diffusion.prediction
        return predicted_x0(prediction, output.float(), clips.noisy, clips.timesteps, self.alphas_cumprod)

    @torch.no_grad()
    def trajectories(self, batch: Batch, draws: BatchGenerator) -> tuple[Trajectories, ...]:
        """The trajectories of a batch's clips and, as clips of one frame, of further first frames."""
        clean = self._clean(batch)  # (B, F, L, D)
        labels = self._labels(batch, draws)  # (B,)
        text = self._text(batch, draws) if self.model.config.text else None
        eps, starts = self._noise(clean, draws), self._starts(len(clean), 1, draws)[:, 0]  # (B, F, L, D), (B,)
        clips = self._follow(clean, eps, starts, labels, text, clean)
        if not (count := self.config.first_frames):
            return (clips,)
        first, labels, text = repeated(clean[:, 0], labels, text, count)  # (B, K, L, D), (B K,)
        eps, starts = self._noise(first, draws), self._starts(len(clean), count, draws)  # (B, K, L, D), (B, K)
        first, eps = (rearrange(tensor, "b k l d -> (b k) 1 l d") for tensor in (first, eps))
        return clips, self._follow(first, eps, starts.flatten(), labels, text, None)

    def _starts(self, clips: int, count: int, draws: BatchGenerator) -> Tensor:
        """The steps at which trajectories begin, int64 ``(B, count)`` on the CPU."""
        weights = torch.tensor(self.config.start_probabilities)
        return draws(clips, lambda g: torch.multinomial(weights, count, replacement=True, generator=g))

    def _follow(
        self,
        clean: Tensor,
        eps: Tensor,
        starts: Tensor,
        labels: Tensor,
        text: TextTokens | None,
        context: Tensor | None,
    ) -> Trajectories:
        """Noises clips, ``clean`` and ``eps (B, F, L, D)``, to the timesteps of the steps ``starts (B,)``, and follows
        the teacher from there to the end."""
        frames = clean.shape[1]
        timesteps = to_device(self.table.timesteps[starts], clean.device)[:, None].expand(-1, frames)  # (B, F)
        noisy = q_sample(clean, eps, timesteps, self.alphas_cumprod)  # (B, F, L, D)
        self.teacher.to(clean.device)
        ends, history = noisy.clone(), tuple(torch.zeros_like(noisy) for _ in range(self.table.history_size))
        for step in range(int(starts.min()), len(self.table.timesteps)):
            rows = (starts <= step).nonzero().flatten()  # clips whose trajectories have begun, b of them
            denoise = guided_denoiser(
                self.teacher,
                self.diffusion,
                labels[rows],
                self.config.guidance,
                None if text is None else replace(text, index=text.index[rows]),
                context=None if context is None else context[rows],
            )
            index = torch.full((len(rows), frames), step)  # (b, F)
            x0 = denoise(ends[rows], self.table.timesteps[index].to(clean.device), torch.arange(frames))
            begins = (starts[rows] == step).to(clean.device)[:, None, None, None]
            # Without a step before it, a trajectory begins with a step of first order, which x0 as its history gives.
            memory = tuple(torch.where(begins, x0, tensor[rows]) for tensor in history)
            ends[rows], memory = solver_step(ends[rows], x0, memory, index, self.table)
            for tensor, new in zip(history, memory, strict=True):
                tensor[rows] = new
        return Trajectories(context, noisy, timesteps, labels, text, ends)


def teacher_table(config: DistillTaskConfig, diffusion: DiffusionConfig) -> SolverTable:
    """The solver of the teacher's trajectories."""
    return solver_table(diffusion, config.teacher_steps, config.teacher_solver, config.teacher_spacing)


def evaluations_of_update(config: DistillTaskConfig, num_frames: int) -> tuple[float, float]:
    """Frames that an update evaluates for each clip of ``num_frames`` frames: by the teacher, on average, and by the
    student. Both branches of guidance count."""
    steps = sum(p * (config.teacher_steps - start) for start, p in enumerate(config.start_probabilities))
    branches = 1 if config.guidance == 1.0 else 2
    evaluated = 2.0 * num_frames + config.first_frames
    return branches * evaluated * steps / config.trajectory_uses, evaluated


def diffusion_of_student(config: DistillTaskConfig, diffusion: DiffusionConfig) -> DiffusionConfig:
    """The diffusion of a student trained with ``config``, from its teacher's: it says what the student is made for."""
    timesteps = teacher_table(config, diffusion).timesteps.tolist()
    starts = [t for t, probability in zip(timesteps, config.start_probabilities, strict=False) if probability > 0]
    student = Student(timesteps=tuple(starts), num_steps=config.student_steps, guidance=config.guidance)
    return replace(diffusion, student=student, sampling_defaults=None)
