"""Training tasks: what a batch costs. The AR-VAE and the AR-DiT are two tasks of one loop.

Shapes: B batch, F frames, H W pixels, L tokens, D latent width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ardiff.data.latents import LatentStatistics
from ardiff.data.transforms import to_uint8, to_unit
from ardiff.diffusion.ad import ad_schedule
from ardiff.diffusion.fopp import sample_timesteps
from ardiff.diffusion.guidance import guided_denoiser
from ardiff.diffusion.noise import q_sample
from ardiff.diffusion.process import DiffusionConfig, diffusion_loss, prediction_target
from ardiff.diffusion.sampler import initial_noise, sample_full
from ardiff.dit import DiT
from ardiff.randomness import Draws
from ardiff.vae import ARAutoencoder

Batch = dict[str, Tensor]


class Task(ABC):
    """A model and its loss."""

    model: nn.Module

    @abstractmethod
    def loss(self, batch: Batch, step: int, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss of a batch on the model's device, and parts of it worth logging.

        ``draws`` is the only source of randomness.
        """

    def samples(self, model: nn.Module) -> Tensor | None:
        """A fixed set of videos, uint8 ``(B, F, H, W, 3)``, that shows what ``model`` can do; None if it cannot."""
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderTaskConfig:
    """The AR-VAE's losses and stages (Sec. 4.1)."""

    reconstruction: Literal["mse", "l1"] = "mse"
    """Distance of pixels in [-1, 1]."""
    kl_weight: float = 1e-3
    """Weight of the Kullback-Leibler term: higher makes latents smoother and the DiT's work easier."""
    temporal_from_step: int = 0
    """From this step on the decoder reads earlier frames; before, every frame stands alone (stage 1 of Sec. 4.1)."""

    def __post_init__(self) -> None:
        if self.kl_weight < 0 or self.temporal_from_step < 0:
            raise ValueError("kl_weight and temporal_from_step must not be negative")


class AutoencoderTask(Task):
    """Reconstructs clips. Batches: ``video`` uint8 ``(B, F, H, W, 3)``."""

    def __init__(self, model: ARAutoencoder, config: AutoencoderTaskConfig, examples: Tensor | None = None) -> None:
        self.model: ARAutoencoder = model
        self.config = config
        self.examples = examples

    def loss(self, batch: Batch, step: int, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        video = to_unit(batch["video"])  # (B, F, 3, H, W)
        shape = (video.shape[1], self.model.config.num_tokens, self.model.config.token_dim)
        noise = draws(len(video), lambda n, g: torch.randn((n, *shape), generator=g)).to(video.device)
        output, posterior = self.model(video, noise, temporal=step >= self.config.temporal_from_step)
        match self.config.reconstruction:
            case "mse":
                reconstruction = nn.functional.mse_loss(output.float(), video)
            case "l1":
                reconstruction = nn.functional.l1_loss(output.float(), video)
            case _:
                raise ValueError(f"unknown reconstruction loss {self.config.reconstruction!r}")
        kl = posterior.kl()
        return reconstruction + self.config.kl_weight * kl, {"reconstruction": reconstruction, "kl": kl}

    @torch.no_grad()
    def samples(self, model: nn.Module) -> Tensor | None:
        """The example clips, each above its reconstruction from the posterior's mean."""
        if self.examples is None:
            return None
        assert isinstance(model, ARAutoencoder)
        video = to_unit(self.examples.to(next(model.parameters()).device))
        output = to_uint8(model.decode(model.encode(video).mean)).cpu()
        return torch.stack([self.examples, output], dim=1).flatten(0, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class DiTTaskConfig:
    """The AR-DiT's training recipe."""

    class_dropout: float = 0.1
    """Probability that a clip is trained with the null class, which makes classifier-free guidance possible."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.class_dropout <= 1.0:
            raise ValueError(f"class_dropout must be in [0, 1], got {self.class_dropout}")


class DiTTask(Task):
    """Denoises latents. Batches: ``latents`` float32 ``(B, F, L, D)`` as encoded, ``label`` int64 ``(B,)``."""

    def __init__(
        self,
        model: DiT,
        config: DiTTaskConfig,
        diffusion: DiffusionConfig,
        statistics: LatentStatistics,
        decode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model: DiT = model
        self.config = config
        self.diffusion = diffusion
        self.statistics = statistics
        self.alphas_cumprod = diffusion.alphas_cumprod()
        self.decode = decode

    def loss(self, batch: Batch, step: int, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        x0 = self.statistics.normalise(batch["latents"])  # (B, F, L, D)
        size, frames = x0.shape[:2]
        law, count = self.diffusion.timestep_law, self.diffusion.num_timesteps
        timesteps = draws(size, lambda n, g: sample_timesteps(law, n, frames, count, g)).to(x0.device)
        eps = draws(size, lambda n, g: torch.randn((n, *x0.shape[1:]), generator=g)).to(x0.device)
        dropped = (draws(size, lambda n, g: torch.rand(n, generator=g)) < self.config.class_dropout).to(x0.device)
        labels = torch.where(dropped, self.model.null_class, batch["label"])
        x_t = q_sample(x0, eps, timesteps, self.alphas_cumprod)
        output = self.model(x_t, timesteps, labels)
        target = prediction_target(self.diffusion.prediction, x0, eps, x_t, timesteps, self.alphas_cumprod)
        loss = diffusion_loss(output, target)
        return loss, {"mean_timestep": timesteps.float().mean()}

    @torch.no_grad()
    def samples(self, model: nn.Module) -> Tensor | None:
        """One synchronous-to-asynchronous sample (20 steps, ``ar_step`` 2) per class, at most 8, seeds 0, 1, ..."""
        if self.decode is None:
            return None
        assert isinstance(model, DiT)
        config = model.config
        labels = torch.arange(min(max(config.num_classes, 1), 8), device=next(model.parameters()).device)
        noise = initial_noise(list(range(len(labels))), config.num_frames, config.num_tokens, config.token_dim)
        denoise = guided_denoiser(model, self.diffusion, labels, 1.0)
        latents = sample_full(denoise, noise.to(labels.device), ad_schedule(config.num_frames, 20, 2), self.diffusion)
        return to_uint8(self.decode(self.statistics.denormalise(latents))).cpu()
