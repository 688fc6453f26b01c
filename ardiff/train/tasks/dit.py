"""The AR-DiT's training task.

Shapes: B batch, F frames, H W pixels, L tokens, D latent width, M text tokens, E their width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ardiff.data.latents import LatentStatistics
from ardiff.data.transforms import to_uint8
from ardiff.diffusion.ad import ad_schedule
from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.guidance import guided_denoiser
from ardiff.diffusion.loss import diffusion_loss, loss_breakdown
from ardiff.diffusion.noise import q_sample
from ardiff.diffusion.prediction import prediction_target
from ardiff.diffusion.sampler import initial_noise, sample_full
from ardiff.diffusion.timestep_sampling import sample_timesteps
from ardiff.dit import DiT, TextTokens
from ardiff.errors import TrainingError
from ardiff.randomness import BatchGenerator
from ardiff.tensors import to_device
from ardiff.train.tasks.base import Batch, Task
from ardiff.train.tasks.config import DiTTaskConfig


class DiTTask(Task):
    """Denoises latents. Batches hold ``latents`` float32 ``(B, F, L, D)`` and ``label`` int64 ``(B,)``.

    The latents are as encoded, not normalised. With ``encode``, batches hold ``video`` uint8 ``(B, F, H, W, 3)``
    instead of latents. A model without classes ignores the labels. For a model with text they also hold ``text``
    float32 ``(B, M, E)`` and ``text_mask`` bool ``(B, M)``, whose rows without any True are clips without text; for a
    model with several shapes of frames ``shape`` int64 ``(B,)``, of which the part of the clips is logged.
    """

    def __init__(
        self,
        model: DiT,
        config: DiTTaskConfig,
        diffusion: DiffusionConfig,
        statistics: LatentStatistics,
        decode: Callable[[Tensor], Tensor] | None = None,
        encode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model: DiT = model
        self.config = config
        self.diffusion = diffusion
        self.statistics = statistics
        self.alphas_cumprod = diffusion.alphas_cumprod()
        self.decode = decode
        self.encode = encode

    def loss(self, batch: Batch, step: int, draws: BatchGenerator) -> tuple[Tensor, dict[str, Tensor]]:
        latents = batch["latents"] if self.encode is None else self.encode(batch["video"])
        x0 = self.statistics.normalise(latents)  # (B, F, L, D)
        size, frames = x0.shape[:2]
        kind, count = self.diffusion.timestep_sampling, self.diffusion.num_timesteps
        timesteps = to_device(sample_timesteps(kind, size, frames, count, draws.generators(size)), x0.device)  # (B, F)
        eps = to_device(draws(size, lambda g: torch.randn(x0.shape[1:], generator=g)), x0.device)  # (B, F, L, D)
        if self.config.noise_clip:
            eps = eps.clamp(-self.config.noise_clip, self.config.noise_clip)
        uniform = draws(size, lambda g: torch.rand((), generator=g))  # (B,)
        dropped = to_device(uniform < self.config.class_dropout, x0.device)  # (B,)
        labels = self.model.label(self._labels(batch["label"], dropped), batch.get("shape", 0))  # (B,)
        x_t = q_sample(x0, eps, timesteps, self.alphas_cumprod)  # (B, F, L, D)
        text = (self._text(batch, draws),) if self.model.config.text else ()
        output = self.model(x_t, timesteps, labels, *text)  # (B, F, L, D)
        target = prediction_target(self.diffusion.prediction, x0, eps, x_t, timesteps, self.alphas_cumprod)
        loss = diffusion_loss(output, target)
        breakdown = loss_breakdown(output, target, timesteps, self.diffusion.num_timesteps)
        logged = {"mean_timestep": timesteps.float().mean(), **breakdown}
        if "shape" in batch:
            shapes = range(self.model.config.num_shapes)
            logged |= {f"share_shape_{i}": (batch["shape"] == i).float().mean() for i in shapes}
        return loss, logged

    def _labels(self, labels: Tensor, dropped: Tensor) -> Tensor:
        """Class indices ``(B,)`` with the null class where ``dropped`` (bool ``(B,)``)."""
        if self.model.config.num_classes == 0:
            labels = torch.full_like(labels, self.model.unlabelled)
        return torch.where(dropped, self.model.null_class, labels)

    def _text(self, batch: Batch, draws: BatchGenerator) -> TextTokens:
        """The text of the clips, some of it dropped. Raises TrainingError if the batch has none."""
        if "text" not in batch:
            raise TrainingError(
                "the model takes text (dit.condition=cross_attention), but the training data has none: encode the "
                "captions with `ardiff encode`, or train with another dit.condition"
            )
        states, mask = batch["text"], batch["text_mask"]
        uniform = draws(len(states), lambda g: torch.rand((), generator=g))  # (B,)
        return TextTokens.of_videos(states, mask, to_device(uniform < self.config.text_dropout, states.device))

    @torch.no_grad()
    def samples(self, model: nn.Module) -> Tensor | None:
        """One video (20 steps, ``ar_step`` 2) for each of the first 8 classes, with seeds 0, 1, ... and no text."""
        if self.decode is None:
            return None
        assert isinstance(model, DiT)
        config = model.config
        labels = torch.arange(min(max(config.num_classes, 1), 8), device=next(model.parameters()).device)
        noise = initial_noise(list(range(len(labels))), config.num_frames, config.num_tokens, config.token_dim)
        denoise = guided_denoiser(model, self.diffusion, labels, 1.0)
        latents = sample_full(denoise, noise.to(labels.device), ad_schedule(config.num_frames, 20, 2), self.diffusion)
        return to_uint8(self.decode(self.statistics.denormalise(latents))).cpu()
