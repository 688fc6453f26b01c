"""The image encoder of CLIP (Radford et al. 2021): features of single frames, of any size, from a model folder.

A feature is the projected embedding of a frame. Folders of models with 224x224 pixels are accepted.
"""

from typing import Any

from einops import rearrange
from torch import Tensor, nn

from ardiff.errors import CheckpointError
from ardiff.metrics.folders import make_model
from ardiff.metrics.registry import Extractor, State, register_network

SIZE = 224


def make_clip(config: dict[str, Any] | None = None, tensors: State | None = None) -> nn.Module:
    """The image half of a folder; see :func:`ardiff.metrics.folders.make_model`. Raises CheckpointError."""
    vision = config and config.get("vision_config", config)
    changes = {"projection_dim": config["projection_dim"]} if config and "projection_dim" in config else {}
    if vision and (size := vision.get("image_size", SIZE)) != SIZE:
        raise CheckpointError(f"This CLIP takes frames of {size} pixels: give one that takes {SIZE}.")
    images = tensors and {key: value for key, value in tensors.items() if key.startswith(("vision_", "visual_"))}
    return make_model("CLIPVisionModelWithProjection", "CLIPVisionConfig", vision, images, **changes)


def _features(model: nn.Module, frames: Tensor, count: int) -> Tensor:
    """A row per frame: ``(n F, 3, 224, 224)`` to ``(n, F, D)``."""
    return rearrange(model(frames).image_embeds, "(n f) d -> n f d", n=count)


CLIP_EXTRACTOR = Extractor(
    name="clip",
    build=make_clip,
    kinds=("clip", "clip_vision_model"),
    size=SIZE,
    value_range="CLIP",
    features=_features,
    per_frame=True,
)
register_network(CLIP_EXTRACTOR)
