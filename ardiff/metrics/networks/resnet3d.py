"""The 3-D ResNet-50 of FID-vid, trained on Kinetics (Hara et al., 2018).

Shapes: B clips, T frames, H W pixels, C channels.
"""

from einops import rearrange, reduce
from torch import Tensor, nn

from ardiff.errors import ConfigError
from ardiff.metrics.registry import Extractor, register_network

MEAN_RGB = (114.7748, 107.7354, 99.4750)
"""The mean colour that is subtracted from frames of 0 to 255."""
SEGMENT = 16
"""Frames of the network's training clips. Longer clips are cut into segments of this length."""


class ResNet3D50(nn.Module):
    """2048 pooled features of clips. Parameters have the public names (``layer1.0.conv1.weight``), shortcuts of type B.

    The classifier ``fc`` is part of the weights but unused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, 64, 7, stride=(1, 2, 2), padding=3, bias=False)
        self.bn1 = nn.BatchNorm3d(64)
        self.maxpool = nn.MaxPool3d(3, stride=2, padding=1)
        width = 64
        for index, (planes, blocks) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True), start=1):
            stages: list[nn.Module] = [_Bottleneck(width, planes, stride=1 if index == 1 else 2)]
            width = planes * _Bottleneck.expansion
            stages += [_Bottleneck(width, planes) for _ in range(blocks - 1)]
            self.add_module(f"layer{index}", nn.Sequential(*stages))
        self.fc = nn.Linear(width, 400)

    def forward(self, video: Tensor) -> Tensor:
        """Features, averaged over space and time.

        Args:
            video: float ``(B, 3, T, 112, 112)``, RGB of 0 to 255 minus ``MEAN_RGB``.

        Returns:
            ``(B, 2048)`` of the same dtype.

        Raises:
            ValueError: Another shape.
        """
        if video.ndim != 5 or video.shape[1] != 3 or tuple(video.shape[3:]) != (112, 112):
            raise ValueError(f"the 3-D ResNet takes clips of shape (B, 3, T, 112, 112), not {tuple(video.shape)}")
        x = self.maxpool(nn.functional.relu(self.bn1(self.conv1(video))))  # (B, 64, T/2, 28, 28)
        for index in range(1, 5):
            x = self.get_submodule(f"layer{index}")(x)  # at the end (B, 2048, T/16, 4, 4)
        return reduce(x, "b c t h w -> b c", "mean")


class _Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, width: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        wide = planes * self.expansion
        self.conv1, self.bn1 = nn.Conv3d(width, planes, 1, bias=False), nn.BatchNorm3d(planes)
        self.conv2 = nn.Conv3d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm3d(planes)
        self.conv3, self.bn3 = nn.Conv3d(planes, wide, 1, bias=False), nn.BatchNorm3d(wide)
        self.downsample = None
        if stride != 1 or width != wide:
            self.downsample = nn.Sequential(nn.Conv3d(width, wide, 1, stride=stride, bias=False), nn.BatchNorm3d(wide))

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu(self.bn1(self.conv1(x)))
        y = nn.functional.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return nn.functional.relu(y + (x if self.downsample is None else self.downsample(x)))


def _features(model: nn.Module, frames: Tensor, count: int) -> Tensor:
    """One row of 2048 features per clip, the mean over its segments: ``(n F, 3, 112, 112)`` to ``(n, 1, 2048)``."""
    segments = rearrange(frames, "(n s t) c h w -> (n s) c t h w", n=count, t=SEGMENT)
    return reduce(model(segments), "(n s) d -> n 1 d", "mean", n=count)


def _check_frames(num_frames: int) -> None:
    if num_frames % SEGMENT:
        raise ConfigError(f"FID-vid takes segments of {SEGMENT} frames, and {num_frames} is no multiple of that.")


RESNET3D_EXTRACTOR = Extractor(
    name="resnet3d",
    build=ResNet3D50,
    size=112,
    value_range="minus mean RGB",
    mean_rgb=MEAN_RGB,
    features=_features,
    check_frames=_check_frames,
)
register_network(RESNET3D_EXTRACTOR)
