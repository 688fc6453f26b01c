"""The AR-VAE's training task.

Shapes: B batch, F frames, H W pixels, L tokens, D latent width, N = B F frames of all clips.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from ardiff.data.transforms import to_uint8, to_unit
from ardiff.metrics.networks.lpips import load_lpips
from ardiff.randomness import BatchGenerator
from ardiff.resolution import Resolution
from ardiff.tensors import to_device
from ardiff.train.tasks.base import Batch, Task
from ardiff.train.tasks.config import AutoencoderTaskConfig
from ardiff.vae import ARAutoencoder
from ardiff.vae.discriminator import PatchDiscriminator
from ardiff.vae.losses import adaptive_weight, hinge_discriminator_loss, hinge_generator_loss, recorded

TO_FRAMES = "b f c h w -> (b f) c h w"


class AutoencoderTask(Task):
    """Reconstructs clips. Batches hold ``video`` uint8 ``(B, F, H, W, 3)``, of several shapes also ``shape`` int64
    ``(B,)``, of which the part of the clips is logged."""

    def __init__(self, model: ARAutoencoder, config: AutoencoderTaskConfig, examples: Tensor | None = None) -> None:
        """Draws the discriminator's initial weights, if the configuration has one, from torch's global generator.

        Args:
            examples: Clips for :meth:`samples`, uint8 ``(B, F, H, W, 3)``.

        Raises DataError or CheckpointError if the weights of LPIPS are configured but cannot be loaded.
        """
        self.model: ARAutoencoder = model
        self.config = config
        self.examples = examples
        self.discriminator = PatchDiscriminator(config.discriminator) if config.adversarial_weight else None
        self.discriminator_from_step = config.adversarial_from_step
        self.stage_starts = (config.temporal_from_step, config.adversarial_from_step)
        self.lpips = load_lpips(config.perceptual_weights) if config.perceptual_weight else None
        self._real_and_fake: tuple[Tensor, Tensor] | None = None

    def loss(self, batch: Batch, step: int, draws: BatchGenerator) -> tuple[Tensor, dict[str, Tensor]]:
        video = to_unit(batch["video"])  # (B, F, 3, H, W)
        shape = (video.shape[1], self.model.config.num_tokens, self.model.config.token_dim)
        noise = to_device(draws(len(video), lambda g: torch.randn(shape, generator=g)), video.device)  # (B, F, L, D)
        with recorded(self.model.decoder.last_layer) as last_layer:
            output, posterior = self.model(video, noise, temporal=step >= self.config.temporal_from_step)
        reconstruction = self._distance(output.float(), video)
        kl = posterior.kl()
        logged = {"reconstruction": reconstruction, "kl": kl, **self.length_shares(video)}
        if "shape" in batch:
            shapes = enumerate(self.model.config.shapes)
            logged |= {f"share_{shape}": (batch["shape"] == i).float().mean() for i, shape in shapes}
        if self.lpips is not None:
            frames, decoded = rearrange(video, TO_FRAMES), rearrange(output.float(), TO_FRAMES)  # (N, 3, H, W)
            logged["perceptual"] = self.lpips.to(video.device)(frames, decoded).mean()
            reconstruction = reconstruction + self.config.perceptual_weight * logged["perceptual"]
        warmup = min(1.0, (step + 1) / (self.config.kl_warmup_steps + 1)) ** self.config.kl_warmup_power
        loss = reconstruction + warmup * self.config.kl_weight * kl
        if self.config.straightness_weight and video.shape[1] > 2:
            logged["curvature"] = posterior.mean.diff(n=2, dim=1).square().mean()
            loss = loss + warmup * self.config.straightness_weight * logged["curvature"]
        if self.discriminator is None or step < self.config.adversarial_from_step:
            return loss, logged
        self._real_and_fake = rearrange(video, TO_FRAMES), rearrange(output.detach(), TO_FRAMES)
        # Otherwise this loss would add gradients to the discriminator's weights, and its engine would apply them.
        self.discriminator.requires_grad_(False)
        adversarial = hinge_generator_loss(self.discriminator(rearrange(output, TO_FRAMES)).float())
        self.discriminator.requires_grad_(True)
        weight = adaptive_weight(reconstruction, adversarial, last_layer)
        loss = loss + self.config.adversarial_weight * weight * adversarial
        return loss, {**logged, "adversarial": adversarial, "adaptive_weight": weight}

    def _distance(self, output: Tensor, video: Tensor) -> Tensor:
        """The configured mean distance between pixels, a scalar."""
        match self.config.reconstruction:
            case "mse":
                return nn.functional.mse_loss(output, video)
            case "l1":
                return nn.functional.l1_loss(output, video)
            case _:
                raise ValueError(f"unknown reconstruction loss {self.config.reconstruction!r}")

    def discriminator_loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.discriminator is not None
        assert self._real_and_fake is not None
        (real, fake), self._real_and_fake = self._real_and_fake, None  # (N, 3, H, W)
        real_scores, fake_scores = (self.discriminator(frames).float() for frames in (real, fake))
        loss = hinge_discriminator_loss(real_scores, fake_scores)
        return loss, {"discriminator_real": real_scores.mean(), "discriminator_fake": fake_scores.mean()}

    @torch.no_grad()
    def samples(self, model: nn.Module) -> Tensor | None:
        """The example clips, each above its reconstruction from the posterior's mean."""
        if self.examples is None:
            return None
        assert isinstance(model, ARAutoencoder)
        video = to_unit(self.examples.to(next(model.parameters()).device))
        output = to_uint8(model.decode(model.encode(video).mean, shape=Resolution(*video.shape[3:]))).cpu()
        return rearrange([self.examples, output], "two b f h w c -> (b two) f h w c")
