"""Configurations of the authors' models: those of the AR-DiT and AR-VAE with a few fields fixed and a few more."""

from dataclasses import dataclass
from typing import Literal

from ardiff.dit.config import DiTConfig
from ardiff.vae.config import AutoencoderConfig

PATCH_SIZE = 16
"""Patch size of the convolutional pixel decoder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpstreamDiTConfig(DiTConfig):
    """Sizes and options of the authors' AR-DiT; see :class:`ardiff.upstream.dit.UpstreamDiT`."""

    kind: Literal["upstream"] = "upstream"  # type: ignore[assignment]
    """Kind of model."""
    positions: Literal["sincos"] = "sincos"
    """Sine-cosine embeddings, which are weights here."""
    condition: Literal["tokens"] = "tokens"
    """The class is a sequence of condition tokens before the first frame."""
    condition_attention: Literal["self", "all"] = "all"
    """``all``: condition tokens see every frame, so earlier frames see later ones through them. ``self``: condition
    tokens see only one another, so the model is causal. With ``attention=bidirectional`` they see everything."""
    guidance_null: Literal["zero", "first_class"] = "zero"
    """"No class" in classifier-free guidance. ``zero``: condition tokens that are zero. ``first_class``: class 0."""

    def __post_init__(self) -> None:
        DiTConfig.__post_init__(self)
        if self.guidance_null == "first_class" and not self.num_classes:
            raise ValueError("guidance_null=first_class needs a model with classes")

    @property
    def causal(self) -> bool:
        """Whether no frame sees a later one, also not through condition tokens."""
        return self.attention == "causal" and self.condition_attention == "self"


@dataclass(frozen=True, kw_only=True, slots=True)
class UpstreamAutoencoderConfig(AutoencoderConfig):
    """Sizes and options of the authors' AR-VAE; see :class:`ardiff.upstream.autoencoder.UpstreamAutoencoder`."""

    kind: Literal["upstream"] = "upstream"  # type: ignore[assignment]
    """Kind of model."""
    temporal: Literal["clip", "none"] = "clip"  # type: ignore[assignment]
    """``clip``: frames are decoded in clips of ``temporal_window`` frames, within which each frame reads the earlier
    ones. ``none``: each frame is decoded alone."""

    def __post_init__(self) -> None:
        AutoencoderConfig.__post_init__(self)
        if self.patch_size != PATCH_SIZE:
            raise ValueError(f"kind=upstream needs patch_size {PATCH_SIZE}, got {self.patch_size}")
        if self.resolution.height != self.resolution.width or self.buckets:
            raise ValueError(
                f"kind=upstream makes square frames only, because the authors' weights hold positions of squares, got "
                f"{', '.join(map(str, self.shapes))}: train a model of kind=standard for other shapes"
            )

    @property
    def unit_latents(self) -> bool:
        """Latent tokens have length 1, so there is nothing to normalise before diffusion."""
        return True
