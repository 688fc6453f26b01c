"""V-JEPA 2 (Assran et al. 2025): a video encoder with rotary positions, of any size, from a model folder.

A feature is the mean over the encoder's tokens. Folders of models with 256x256 pixels are accepted.
"""

from typing import Any

from einops import rearrange, reduce
from torch import Tensor, nn

from ardiff.errors import CheckpointError, ConfigError
from ardiff.metrics.folders import make_model
from ardiff.metrics.registry import Extractor, State, register_network

SIZE = 256
TUBELET = 2
"""Frames of a token."""


def make_vjepa2(config: dict[str, Any] | None = None, tensors: State | None = None) -> nn.Module:
    """The encoder of a folder; see :func:`ardiff.metrics.folders.make_model`. Raises CheckpointError."""
    if config is not None and config.get("crop_size", SIZE) != SIZE:
        raise CheckpointError(
            f"This V-JEPA 2 takes frames of {config['crop_size']} pixels: give one that takes {SIZE}, such as "
            "facebook/vjepa2-vitl-fpc64-256."
        )
    return make_model("VJEPA2Model", "VJEPA2Config", config, tensors)


def _features(model: nn.Module, frames: Tensor, count: int) -> Tensor:
    """One row per clip: ``(n F, 3, 256, 256)`` to ``(n, 1, D)``."""
    clips = rearrange(frames, "(n f) c h w -> n f c h w", n=count)
    return reduce(model(clips, skip_predictor=True).last_hidden_state, "n t d -> n 1 d", "mean")


def _check_frames(num_frames: int) -> None:
    if num_frames % TUBELET:
        raise ConfigError(f"V-JEPA 2 takes an even number of frames, not {num_frames}: change --frames.")


VJEPA2_EXTRACTOR = Extractor(
    name="vjepa2",
    build=make_vjepa2,
    kinds=("vjepa2",),
    size=SIZE,
    value_range="ImageNet",
    features=_features,
    check_frames=_check_frames,
)
register_network(VJEPA2_EXTRACTOR)
