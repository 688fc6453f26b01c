"""A feature network of one's own, and the Frechet distance of its features: how much the colours of two sets differ.

python examples/write_an_extractor.py

As a file in ardiff/metrics/networks/ that calls register_network, and a metric in ardiff/metrics/sets/, it is a metric
of `ardiff evaluate`.
"""

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from ardiff.metrics.distances import Frechet
from ardiff.metrics.extractors import FeatureExtractor
from ardiff.metrics.registry import Extractor, MetricSpec


class ColourMoments(nn.Module):
    """Mean and standard deviation of each colour of a frame: D = 6. It has no weights."""

    def forward(self, frames: Tensor) -> Tensor:
        """Frames ``(N, 3, S, S)`` of -1 to 1 to features ``(N, 6)``."""
        mean = reduce(frames, "n c h w -> n c", "mean")
        square = reduce(frames.square(), "n c h w -> n c", "mean")
        return torch.cat([mean, (square - mean.square()).clamp(min=0).sqrt()], dim=1)


def features(model: nn.Module, frames: Tensor, count: int) -> Tensor:
    """A row of features for each frame: ``(n F, 3, S, S)`` to ``(n, F, 6)``."""
    rows: Tensor = model(frames)
    return rearrange(rows, "(n f) d -> n f d", n=count)


COLOURS = Extractor(
    name="colours", build=ColourMoments, untrained=True, size=32, value_range="[-1, 1]", features=features
)
SPEC = MetricSpec(network=COLOURS, feature="colour moments of every frame", resize="bilinear", distance=Frechet())


def main() -> None:
    """Compares videos with others of the same kind, and with darker ones."""
    extract = FeatureExtractor(SPEC, {}, torch.device("cpu"))
    videos = np.random.default_rng(0).integers(0, 256, (3, 8, 4, 32, 32, 3), dtype=np.uint8)  # sets, clips, frames
    real, same, dark = extract(videos[0]), extract(videos[1]), extract(videos[2] // 2)
    print(f"the same kind {SPEC.distance(real, same):.4f}, darker {SPEC.distance(real, dark):.4f}")


if __name__ == "__main__":
    main()
