"""A feature network of single frames that needs no weights: seeded random convolutions, averaged over the frame.

Shapes: n clips, F frames, S pixels, C channels.
"""

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from ardiff.metrics.networks.random3d import unit_rows
from ardiff.metrics.registry import Extractor, register_network
from ardiff.randomness import torch_generator

SIZE = 128
WIDTH = 16
"""Channels of each layer."""
LAYERS = 2
"""Deeper layers, which halve height and width again, see a change of shape less."""


class RandomFrameFeatures(nn.Module):
    """Random convolutions (5x5, then 3x3 of stride 2) with rows of unit norm and the absolute value as nonlinearity.

    The features of a frame are the averages of all layers over height and width, which hardly depend on where things
    are: D = 32.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch_generator("random frames", 0)
        for layer in range(LAYERS):
            width, kernel = (3, (1, 5, 5)) if layer == 0 else (WIDTH, (1, 3, 3))
            self.register_buffer(f"layer_{layer}", unit_rows(WIDTH, width, kernel, generator)[:, :, 0])

    def forward(self, frames: Tensor) -> Tensor:
        """Frames ``(N, 3, S, S)`` of -1 to 1 to features ``(N, 32)``."""
        pooled = []
        for layer in range(LAYERS):
            weight = self.get_buffer(f"layer_{layer}")
            stride, padding = (1, 2) if layer == 0 else (2, 1)
            frames = nn.functional.conv2d(frames, weight, stride=stride, padding=padding).abs()  # (N, C, S', S')
            pooled.append(reduce(frames, "n c h w -> n c", "mean"))
        return torch.cat(pooled, dim=1)


def _features(model: nn.Module, frames: Tensor, count: int) -> Tensor:
    return rearrange(model(frames), "(n f) d -> n f d", n=count)


RANDOM_FRAMES_EXTRACTOR = Extractor(
    name="random-frames",
    build=RandomFrameFeatures,
    untrained=True,
    size=SIZE,
    value_range="[-1, 1]",
    features=_features,
    per_frame=True,
)
register_network(RANDOM_FRAMES_EXTRACTOR)
