"""A feature network that needs no weights: seeded random 3-D convolutions over frames and frame differences.

Distances between its features rank controls of small synthetic videos sensibly. They are not FVD and never share a
table with it.

Shapes: B videos, F frames, H W pixels, C channels, D features.
"""

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from ardiff.randomness import torch_generator

WIDTHS = (24, 32)
"""Channels of the two layers of a stream."""
STREAMS = ("appearance", "motion")
NUM_FEATURES = len(STREAMS) * sum(WIDTHS)


class RandomVideoFeatures(nn.Module):
    """An untrained feature network, a pure function of its seed.

    Two streams, one over the frames and one over the differences of neighbouring frames, each of two random 3-D
    convolutions (3x5x5, then 3x3x3, both halving H and W) with rows of unit norm and the absolute value as
    nonlinearity. The features are the means over F, H, W of both layers of both streams: D = 112 for any video size.

    Attributes:
        name: The name of the weights in a :class:`~ardiff.metrics.protocol.Protocol`.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.name = f"random3d-seed{seed}-v1"
        for stream in STREAMS:
            generator = torch_generator("random3d", seed, stream)
            self.register_buffer(f"{stream}_1", _unit_rows(WIDTHS[0], 3, (3, 5, 5), generator))
            self.register_buffer(f"{stream}_2", _unit_rows(WIDTHS[1], WIDTHS[0], (3, 3, 3), generator))

    def forward(self, video: Tensor) -> Tensor:
        """Features of videos.

        Args:
            video: uint8 ``(B, F, H, W, 3)`` with F >= 2 and H, W >= 16.

        Returns:
            float32 ``(B, 112)``, on the module's device.

        Raises:
            ValueError: Another dtype or shape.
        """
        if video.dtype != torch.uint8 or video.ndim != 5 or video.shape[-1] != 3:
            raise ValueError(f"expected uint8 videos (B, F, H, W, 3), got {video.dtype} {tuple(video.shape)}")
        if video.shape[1] < 2 or min(video.shape[2:4]) < 16:
            raise ValueError(f"videos need F >= 2 and H, W >= 16, got {tuple(video.shape)}")
        video = video.to(self.get_buffer("motion_1").device)
        frames = rearrange(video, "b f h w c -> b c f h w").float() / 127.5 - 1.0  # (B, 3, F, H, W)
        inputs = {"appearance": frames, "motion": frames.diff(dim=2)}
        pooled = []
        for stream in STREAMS:
            first, second = self.get_buffer(f"{stream}_1"), self.get_buffer(f"{stream}_2")
            hidden = nn.functional.conv3d(inputs[stream], first, stride=(1, 2, 2), padding=(1, 2, 2)).abs()
            deeper = nn.functional.conv3d(hidden, second, stride=(1, 2, 2), padding=1).abs()  # (B, C, F', H/4, W/4)
            pooled += [reduce(layer, "b c f h w -> b c", "mean") for layer in (hidden, deeper)]
        return torch.cat(pooled, dim=1)  # (B, D)


def scale_features(real_reference: Tensor, features: Tensor) -> Tensor:
    """Standardises features by the mean and spread of real reference features, for real and generated sets alike.

    Subtracts the reference's mean and divides by its standard deviation + 0.1 x the mean standard deviation over
    features. So all features count about equally, and a feature that hardly varies in the reference stays small.

    Args:
        real_reference: float ``(N, D)``, N >= 2. features: float ``(M, D)``.

    Returns:
        float64 ``(M, D)``.

    Raises:
        ValueError: The shapes do not match, or the reference does not vary at all.
    """
    if real_reference.ndim != 2 or features.ndim != 2 or real_reference.shape[1] != features.shape[1]:
        raise ValueError(
            f"expected (N, D) and (M, D) features, got {tuple(real_reference.shape)} and {tuple(features.shape)}"
        )
    if len(real_reference) < 2:
        raise ValueError("the real reference needs at least 2 rows")
    reference = real_reference.double()
    spread = reference.std(dim=0, correction=0)  # (D,)
    scale = spread + 0.1 * spread.mean()
    if not (scale > 0).all():
        raise ValueError("the real reference does not vary: its spread is zero or not a number")
    return (features.double() - reference.mean(dim=0)) / scale


def _unit_rows(out_width: int, in_width: int, kernel: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Gaussian kernels ``(out, in, *kernel)`` whose rows have norm 1."""
    weight = torch.randn(out_width, in_width, *kernel, generator=generator)
    return weight / weight.square().sum(dim=(1, 2, 3, 4), keepdim=True).sqrt()
