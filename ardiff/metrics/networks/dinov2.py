"""DINOv2 (Oquab et al. 2023): features of single frames, of any size, from a model folder.

A feature is the class token after the last layer norm, as in the Frechet distance of Stein et al. (2023).
"""

from typing import Any

from einops import rearrange
from torch import Tensor, nn

from ardiff.metrics.folders import make_model
from ardiff.metrics.registry import Extractor, State, register_network


def make_dinov2(config: dict[str, Any] | None = None, tensors: State | None = None) -> nn.Module:
    """The model of a folder; see :func:`ardiff.metrics.folders.make_model`. Raises CheckpointError."""
    return make_model("Dinov2Model", "Dinov2Config", config, tensors)


def _features(model: nn.Module, frames: Tensor, count: int) -> Tensor:
    """A row per frame: ``(n F, 3, 224, 224)`` to ``(n, F, D)``."""
    return rearrange(model(frames).pooler_output, "(n f) d -> n f d", n=count)


DINOV2_EXTRACTOR = Extractor(
    name="dinov2",
    build=make_dinov2,
    kinds=("dinov2",),
    size=224,
    value_range="ImageNet",
    features=_features,
    per_frame=True,
)
register_network(DINOV2_EXTRACTOR)
