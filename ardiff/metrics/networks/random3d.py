"""A feature network that needs no weights: seeded random convolutions over frames and frame differences.

Distances between its features rank controls of small synthetic videos sensibly. They are not FVD and never share a
table with it.

Shapes: B videos, F frames, H W pixels, C channels, D features.
"""

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from ardiff.randomness import torch_generator

WIDTH = 16
"""Channels of each of the two layers of a stream."""
STREAMS = {"appearance": 1, "motion": 3}
"""The frames of a kernel of each stream's first layer."""
NUM_FEATURES = len(STREAMS) * 2 * WIDTH * 2
MIN_FRAMES = 3
"""The motion stream has F - 1 steps, and a change needs two of them."""


class RandomVideoFeatures(nn.Module):
    """An untrained feature network, a pure function of its seed.

    Two streams, one over the frames and one over the differences of neighbouring frames, each of two random
    convolutions (1x5x5 or 3x5x5 at full resolution, then 1x3x3 that halves H and W) with rows of unit norm and the
    absolute value as nonlinearity. Each layer is averaged over H and W, which gives a curve over time per channel. The
    features are the mean of each curve, and the root mean square of its change from one step to the next.

    The mean says what a video shows and how fast it moves. It hardly sees a shape that turns into another one and
    back; the change does: an average over H and W hardly depends on where a thing is, so it stays almost constant
    while a thing moves and jumps when the thing becomes another one. That needs the full resolution: at half of it, the
    average also depends on the position below a pixel. The change of the motion stream sees uneven motion.

    D = 128 for any video size.

    Attributes:
        name: The name of the weights in a :class:`~ardiff.metrics.protocol.Protocol`.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.name = f"random3d-seed{seed}-v2"
        for stream, depth in STREAMS.items():
            generator = torch_generator("random3d", seed, stream)
            self.register_buffer(f"{stream}_1", unit_rows(WIDTH, 3, (depth, 5, 5), generator))
            self.register_buffer(f"{stream}_2", unit_rows(WIDTH, WIDTH, (1, 3, 3), generator))

    def forward(self, video: Tensor) -> Tensor:
        """Features of videos.

        Args:
            video: uint8 ``(B, F, H, W, 3)`` with F >= 3 and H, W >= 16.

        Returns:
            float32 ``(B, 128)``, on the module's device.

        Raises:
            ValueError: Another dtype or shape.
        """
        if video.dtype != torch.uint8 or video.ndim != 5 or video.shape[-1] != 3:
            raise ValueError(f"expected uint8 videos (B, F, H, W, 3), got {video.dtype} {tuple(video.shape)}")
        if video.shape[1] < MIN_FRAMES or min(video.shape[2:4]) < 16:
            raise ValueError(f"videos need F >= {MIN_FRAMES} and H, W >= 16, got {tuple(video.shape)}")
        video = video.to(self.get_buffer("motion_1").device)
        frames = rearrange(video, "b f h w c -> b c f h w").float() / 127.5 - 1.0  # (B, 3, F, H, W)
        appearance = self._curves("appearance", frames)
        motion = self._curves("motion", frames.diff(dim=2))
        return torch.cat([*map(_summarize_curves, (*appearance, *motion))], dim=1)  # (B, D)

    def _curves(self, stream: str, inputs: Tensor) -> list[Tensor]:
        """The curves of both layers of a stream, ``(B, C, F)`` each, from ``(B, 3, F, H, W)``."""
        first, second = self.get_buffer(f"{stream}_1"), self.get_buffer(f"{stream}_2")
        hidden = nn.functional.conv3d(inputs, first, padding=(first.shape[2] // 2, 2, 2)).abs()  # (B, C, F, H, W)
        deeper = nn.functional.conv3d(hidden, second, stride=(1, 2, 2), padding=(0, 1, 1)).abs()
        return [reduce(layer, "b c f h w -> b c f", "mean") for layer in (hidden, deeper)]


def _summarize_curves(curves: Tensor) -> Tensor:
    """The mean of each curve ``(B, C, F)`` and the root mean square of its change per step, ``(B, 2 C)``."""
    change = reduce(curves.diff(dim=2).square(), "b c f -> b c", "mean").sqrt()
    return torch.cat([reduce(curves, "b c f -> b c", "mean"), change], dim=1)


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


def unit_rows(out_width: int, in_width: int, kernel: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Gaussian kernels ``(out, in, *kernel)`` whose rows have norm 1."""
    weight = torch.randn(out_width, in_width, *kernel, generator=generator)
    return weight / weight.square().sum(dim=(1, 2, 3, 4), keepdim=True).sqrt()
