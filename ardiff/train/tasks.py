"""Training tasks: what a batch costs. The AR-VAE and the AR-DiT are two tasks of one loop.

Shapes: B batch, F frames, H W pixels, L tokens, D latent width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from ardiff.data.latents import LatentStatistics
from ardiff.data.transforms import to_uint8, to_unit
from ardiff.diffusion.ad import ad_schedule
from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.guidance import guided_denoiser
from ardiff.diffusion.loss import diffusion_loss, loss_breakdown
from ardiff.diffusion.noise import q_sample
from ardiff.diffusion.prediction import prediction_target
from ardiff.diffusion.sampler import initial_noise, sample_full
from ardiff.diffusion.timestep_sampling import sample_timesteps
from ardiff.dit import DiT
from ardiff.metrics.lpips import load_lpips
from ardiff.randomness import BatchGenerator
from ardiff.vae import ARAutoencoder
from ardiff.vae.config import DiscriminatorConfig
from ardiff.vae.discriminator import PatchDiscriminator
from ardiff.vae.losses import adaptive_weight, hinge_discriminator_loss, hinge_generator_loss, recorded

Batch = dict[str, Tensor]
PACK = "b f c h w -> (b f) c h w"


class Task(ABC):
    """A model and its loss; and, in adversarial training, a second network that learns against it."""

    model: nn.Module
    critic: nn.Module | None = None
    """The second network, trained by an engine of its own; None without."""
    critic_from_step: int = 0
    """First step (0-based) at which the critic is trained."""
    changes: tuple[int, ...] = ()
    """Steps (0-based) from which on batches take other operations than before."""

    @abstractmethod
    def loss(self, batch: Batch, step: int, draws: BatchGenerator) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss of a batch on the model's device, and parts of it worth logging.

        A part is a scalar, of which the mean over parts of the batch and workers is logged, or a sum and a count
        ``(2,)``, which are added up. ``draws`` is the only source of randomness.
        """

    def critic_loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's scalar loss on what the last call of :meth:`loss` saw and made, and parts of it worth logging.

        Its gradients reach the critic only, as those of :meth:`loss` reach the model only.
        """
        raise NotImplementedError("this task has no critic")

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
    smoothness_weight: float = 0.0
    """Weight of the mean squared difference between the latent means of neighbouring frames. Small models whose latents
    jump from frame to frame leave the DiT a hard task; not in the paper, so 0 leaves it out. Clips of one frame have
    no such difference."""
    kl_warmup_steps: int = 0
    """Steps over which ``kl_weight`` and ``smoothness_weight`` rise linearly from zero. At their full weight from the
    start, a small model may find it cheaper to leave latents without content (posterior collapse), for good."""
    temporal_from_step: int = 0
    """From this step on the decoder reads earlier frames; before, every frame stands alone (stages 1 and 2 of
    Sec. 4.1)."""
    perceptual_weight: float = 0.0
    """Weight of the perceptual distance (LPIPS) between frames and their reconstructions; 0 leaves it out."""
    perceptual_weights: str = ""
    """Safetensors file with the weights of LPIPS, local or ``s3://``; needed for the perceptual loss."""
    adversarial_weight: float = 0.0
    """Weight of the adversarial loss, on top of the adaptive one; 0 trains without a discriminator."""
    adversarial_from_step: int = 0
    """First step with the adversarial loss, and of the discriminator's training (stage 2 of Sec. 4.1)."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """The discriminator's sizes."""

    def __post_init__(self) -> None:
        if min(self.kl_weight, self.smoothness_weight, self.perceptual_weight, self.adversarial_weight) < 0:
            raise ValueError(
                "kl_weight, smoothness_weight, perceptual_weight and adversarial_weight must not be negative"
            )
        if self.perceptual_weight and not self.perceptual_weights:
            raise ValueError("perceptual_weight needs perceptual_weights, the file with the weights of LPIPS")
        if min(self.kl_warmup_steps, self.temporal_from_step, self.adversarial_from_step) < 0:
            raise ValueError("kl_warmup_steps, temporal_from_step and adversarial_from_step must not be negative")


class AutoencoderTask(Task):
    """Reconstructs clips. Batches: ``video`` uint8 ``(B, F, H, W, 3)``."""

    def __init__(self, model: ARAutoencoder, config: AutoencoderTaskConfig, examples: Tensor | None = None) -> None:
        """BatchGenerator the weights of the discriminator, if the configuration asks for one, from torch's generator.

        Raises DataError or CheckpointError if the weights of LPIPS are asked for and cannot be loaded.
        """
        self.model: ARAutoencoder = model
        self.config = config
        self.examples = examples
        self.critic = PatchDiscriminator(config.discriminator) if config.adversarial_weight else None
        self.critic_from_step = config.adversarial_from_step
        self.changes = (config.temporal_from_step, config.adversarial_from_step)
        self.perceptual = load_lpips(config.perceptual_weights) if config.perceptual_weight else None
        self._pair: tuple[Tensor, Tensor] | None = None

    def loss(self, batch: Batch, step: int, draws: BatchGenerator) -> tuple[Tensor, dict[str, Tensor]]:
        video = to_unit(batch["video"])  # (B, F, 3, H, W)
        shape = (video.shape[1], self.model.config.num_tokens, self.model.config.token_dim)
        noise = draws(len(video), lambda n, g: torch.randn((n, *shape), generator=g)).to(video.device)
        with recorded(self.model.decoder.last_layer) as last:
            output, posterior = self.model(video, noise, temporal=step >= self.config.temporal_from_step)
        match self.config.reconstruction:
            case "mse":
                reconstruction = nn.functional.mse_loss(output.float(), video)
            case "l1":
                reconstruction = nn.functional.l1_loss(output.float(), video)
            case _:
                raise ValueError(f"unknown reconstruction loss {self.config.reconstruction!r}")
        kl = posterior.kl()
        parts = {"reconstruction": reconstruction, "kl": kl}
        if self.perceptual is not None:
            frames, decoded = rearrange(video, PACK), rearrange(output.float(), PACK)
            parts["perceptual"] = self.perceptual.to(video.device)(frames, decoded).mean()
            reconstruction = reconstruction + self.config.perceptual_weight * parts["perceptual"]
        warmth = min(1.0, (step + 1) / (self.config.kl_warmup_steps + 1))
        loss = reconstruction + warmth * self.config.kl_weight * kl
        if self.config.smoothness_weight and video.shape[1] > 1:
            parts["smoothness"] = posterior.mean.diff(dim=1).square().mean()
            loss = loss + warmth * self.config.smoothness_weight * parts["smoothness"]
        if self.critic is None or step < self.config.adversarial_from_step:
            return loss, parts
        self._pair = rearrange(video, PACK), rearrange(output.detach(), PACK)
        # Without this the gradients would reach the critic's weights, and its engine would add them to its own.
        self.critic.requires_grad_(False)
        adversarial = hinge_generator_loss(self.critic(rearrange(output, PACK)).float())
        self.critic.requires_grad_(True)
        weight = adaptive_weight(reconstruction, adversarial, last)
        loss = loss + self.config.adversarial_weight * weight * adversarial
        return loss, {**parts, "adversarial": adversarial, "adaptive_weight": weight}

    def critic_loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.critic is not None
        assert self._pair is not None
        (real, fake), self._pair = self._pair, None
        real_scores, fake_scores = (self.critic(frames).float() for frames in (real, fake))
        loss = hinge_discriminator_loss(real_scores, fake_scores)
        return loss, {"critic_real": real_scores.mean(), "critic_fake": fake_scores.mean()}

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
    noise_clip: float = 0.0
    """Noise is clamped to this many standard deviations (noise clipping of Sec. 4.1); 0 leaves it as it is drawn."""

    def __post_init__(self) -> None:
        if self.noise_clip < 0:
            raise ValueError(f"noise_clip must not be negative, got {self.noise_clip}")
        if not 0.0 <= self.class_dropout <= 1.0:
            raise ValueError(f"class_dropout must be in [0, 1], got {self.class_dropout}")


class DiTTask(Task):
    """Denoises latents. Batches: ``latents`` float32 ``(B, F, L, D)`` as encoded, ``label`` int64 ``(B,)``.

    With ``encode``, batches hold ``video`` uint8 ``(B, F, H, W, 3)`` in the place of latents. For a model without
    classes it does not matter what the labels are.
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
        law, count = self.diffusion.timestep_sampling, self.diffusion.num_timesteps
        timesteps = draws(size, lambda n, g: sample_timesteps(law, n, frames, count, g)).to(x0.device)
        eps = draws(size, lambda n, g: torch.randn((n, *x0.shape[1:]), generator=g)).to(x0.device)
        if self.config.noise_clip:
            eps = eps.clamp(-self.config.noise_clip, self.config.noise_clip)
        dropped = (draws(size, lambda n, g: torch.rand(n, generator=g)) < self.config.class_dropout).to(x0.device)
        labels = batch["label"]
        if self.model.config.num_classes == 0:
            labels = torch.full_like(labels, self.model.unlabelled)
        labels = torch.where(dropped, self.model.null_class, labels)
        x_t = q_sample(x0, eps, timesteps, self.alphas_cumprod)
        output = self.model(x_t, timesteps, labels)
        target = prediction_target(self.diffusion.prediction, x0, eps, x_t, timesteps, self.alphas_cumprod)
        loss = diffusion_loss(output, target)
        parts = loss_breakdown(output, target, timesteps, self.diffusion.num_timesteps)
        return loss, {"mean_timestep": timesteps.float().mean(), **parts}

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
