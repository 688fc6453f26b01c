"""ARDiffusionPipeline: a trained AR-VAE and AR-DiT that turn class labels and seeds into videos.

Shapes: B videos, F frames, H W pixels, L tokens, D latent width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from ardiff.config import to_dict
from ardiff.data.latents import LatentStatistics
from ardiff.data.transforms import to_uint8
from ardiff.diffusion.ad import ad_schedule
from ardiff.diffusion.guidance import guided_denoiser
from ardiff.diffusion.process import DiffusionConfig
from ardiff.diffusion.sampler import initial_noise, sample_full
from ardiff.dit import DiT, DiTConfig
from ardiff.errors import CheckpointError
from ardiff.pretrained import build_config, load_weights, local_folder, read_config, write_model
from ardiff.vae import ARAutoencoder, AutoencoderConfig


class ARDiffusionPipeline:
    """Generates videos. Neither Ray nor the trainer is needed.

    >>> pipeline = ARDiffusionPipeline.from_pretrained("runs/quickstart/pipeline")
    >>> video = pipeline(class_label=[0, 1], num_frames=16, ar_step=5, seed=[0, 1])  # uint8 (2, 16, H, W, 3)
    """

    def __init__(
        self,
        vae: ARAutoencoder,
        dit: DiT,
        diffusion: DiffusionConfig,
        statistics: LatentStatistics,
        class_names: Sequence[str] = (),
    ) -> None:
        """Raises CheckpointError if the two models do not share the shape of their latents."""
        ours, theirs = (vae.config.num_tokens, vae.config.token_dim), (dit.config.num_tokens, dit.config.token_dim)
        if ours != theirs:
            raise CheckpointError(f"The AR-VAE has (L, D) = {ours} latents, the AR-DiT {theirs}: they do not fit.")
        self.vae, self.dit = vae.eval(), dit.eval()
        self.diffusion = diffusion
        self.statistics = statistics
        self.class_names = list(class_names)

    @classmethod
    def from_pretrained(cls, uri: str, device: str | torch.device = "cpu") -> ARDiffusionPipeline:
        """Loads a folder written by :meth:`save_pretrained`, local or ``s3://``.

        Raises:
            CheckpointError: There is no complete pipeline, or its weights do not fit its configuration.
        """
        with local_folder(uri) as folder:
            config = read_config(folder, "ar-diffusion-pipeline")
            vae = ARAutoencoder(build_config(AutoencoderConfig, config["vae"]))
            dit = DiT(build_config(DiTConfig, config["dit"]))
            return cls(
                load_weights(vae, folder / "vae.safetensors"),
                load_weights(dit, folder / "dit.safetensors"),
                build_config(DiffusionConfig, config["diffusion"]),
                LatentStatistics(**config["latent_statistics"]),
                config["class_names"],
            ).to(device)

    def save_pretrained(self, uri: str) -> None:
        """Writes ``config.json``, ``vae.safetensors`` and ``dit.safetensors`` to a folder, local or ``s3://``."""
        config = {
            "kind": "ar-diffusion-pipeline",
            "vae": to_dict(self.vae.config),
            "dit": to_dict(self.dit.config),
            "diffusion": to_dict(self.diffusion),
            "latent_statistics": asdict(self.statistics),
            "class_names": self.class_names,
        }
        modules = {"vae": dict(self.vae.named_parameters()), "dit": dict(self.dit.named_parameters())}
        write_model(uri, config, modules)

    def to(self, device: str | torch.device) -> ARDiffusionPipeline:
        """Moves both models."""
        self.vae.to(device)
        self.dit.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(self.dit.parameters()).device

    @torch.no_grad()
    def __call__(
        self,
        class_label: int | Sequence[int] | None = None,
        num_frames: int = 16,
        ar_step: int = 5,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        seed: int | Sequence[int] = 0,
        on_iteration: Callable[[int], None] = lambda finished_frames: None,
    ) -> Tensor:
        """Generates videos; a video depends on its own label and seed, not on what it is generated with.

        Args:
            class_label: Class index or indices; None generates without a class.
            num_frames: F. Videos longer than the model sees at once are made with a sliding window.
            ar_step: The paper's timestep difference, from 0 (all frames together) to ``num_inference_steps`` (frame by
                frame).
            num_inference_steps: S.
            guidance_scale: Strength of classifier-free guidance; 1 is none.
            seed: Seed or seeds. Labels and seeds are paired; a single one goes with all of the others.
            on_iteration: Called with the number of final frames after every iteration.

        Returns:
            uint8 ``(B, F, H, W, 3)`` on the CPU.

        Raises:
            ValueError: A label, a size or ``ar_step`` is out of range; the message says what is valid.
        """
        labels, seeds = self._pair(class_label, seed)
        schedule = ad_schedule(num_frames, num_inference_steps, ar_step, window=self.dit.config.num_frames)
        noise = initial_noise(seeds, num_frames, self.dit.config.num_tokens, self.dit.config.token_dim)
        denoise = guided_denoiser(self.dit, self.diffusion, labels, guidance_scale)
        latents = sample_full(denoise, noise.to(self.device), schedule, self.diffusion, on_iteration)
        return self.decode(latents)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents ``(B, F, L, D)`` of the diffusion model to uint8 video ``(B, F, H, W, 3)`` on the CPU."""
        return to_uint8(self.vae.decode_long(self.statistics.denormalise(latents))).cpu()

    def _pair(self, class_label: int | Sequence[int] | None, seed: int | Sequence[int]) -> tuple[Tensor, list[int]]:
        null = self.dit.null_class
        if class_label is None:
            labels = [null]
        else:
            labels = [class_label] if isinstance(class_label, int) else list(class_label)
            for label in labels:
                if not 0 <= label < null:
                    valid = f"0..{null - 1}" if null else "no class at all"
                    raise ValueError(f"class_label {label} is out of range: the model knows {valid}")
        seeds = [seed] if isinstance(seed, int) else list(seed)
        count = max(len(labels), len(seeds))
        if {len(labels), len(seeds)} - {1, count}:
            raise ValueError(f"{len(labels)} class labels and {len(seeds)} seeds cannot be paired")
        labels, seeds = labels * (count // len(labels)), seeds * (count // len(seeds))
        return torch.tensor(labels, device=self.device), seeds
