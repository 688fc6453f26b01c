"""I3D, the network of FVD: an Inception-v1 inflated to 3-D, trained on Kinetics-400 (Carreira and Zisserman, 2017).

Shapes: B clips, T frames, H W pixels, C channels, T' time steps that are left after pooling.
"""

from typing import Literal

import torch
from torch import Tensor, nn

MIN_FRAMES = 10
"""Shortest clip of FVD; the last pooling has nothing to average in shorter ones."""

# Channels of the branches b0, b1a, b1b, b2a, b2b, b3b, by block.
_MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


class I3D(nn.Module):
    """Kinetics-400 logits of clips. Parameters have the names of the public PyTorch port (``Mixed_3b.b1a.conv3d...``).

    Convolutions and poolings pad as TensorFlow's "SAME" does, batch normalisation has epsilon 1e-3: with 1e-5, as some
    ports have it, the features are 3 % off.

    Args:
        pool_frames: Time steps that the last pooling averages. 2 is the original graph; 1 that of the AR-Diffusion
            authors, which is the same up to 16 frames and differs by some percent above.
    """

    def __init__(self, pool_frames: Literal[1, 2] = 2) -> None:
        super().__init__()
        if pool_frames not in (1, 2):
            raise ValueError(f"pool_frames must be 1 or 2, not {pool_frames}")
        self.pool_frames = pool_frames
        self.Conv3d_1a_7x7 = _Unit(3, 64, 7, stride=2)
        self.MaxPool3d_2a_3x3 = _MaxPool((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1 = _Unit(64, 64, 1)
        self.Conv3d_2c_3x3 = _Unit(64, 192, 3)
        self.MaxPool3d_3a_3x3 = _MaxPool((1, 3, 3), (1, 2, 2))
        width = 192
        for name, branches in _MIXED.items():
            if name == "Mixed_4b":
                self.MaxPool3d_4a_3x3 = _MaxPool((3, 3, 3), (2, 2, 2))
            if name == "Mixed_5b":
                self.MaxPool3d_5a_2x2 = _MaxPool((2, 2, 2), (2, 2, 2))
            self.add_module(name, _Mixed(width, branches))
            width = branches[0] + branches[2] + branches[4] + branches[5]
        self.logits = _Unit(width, 400, 1, plain=True)

    def forward(self, video: Tensor) -> Tensor:
        """Logits, averaged over time.

        Args:
            video: float ``(B, 3, T, 224, 224)`` in [-1, 1], T >= 10.

        Returns:
            ``(B, 400)`` of the same dtype.

        Raises:
            ValueError: Another shape.
        """
        return self.logits_in_time(video).mean(dim=2)

    def logits_in_time(self, video: Tensor) -> Tensor:
        """Logits of each time step, ``(B, 400, T')``."""
        return self.logits(self._pooled(video))[:, :, :, 0, 0]

    def pooled_in_time(self, video: Tensor) -> Tensor:
        """The 1024 pooled features of each time step, ``(B, 1024, T')``."""
        return self._pooled(video)[:, :, :, 0, 0]

    def _pooled(self, video: Tensor) -> Tensor:
        if video.ndim != 5 or video.shape[1] != 3 or tuple(video.shape[3:]) != (224, 224):
            raise ValueError(f"I3D takes clips of shape (B, 3, T, 224, 224), not {tuple(video.shape)}")
        if video.shape[2] < MIN_FRAMES:
            raise ValueError(f"I3D needs clips of at least {MIN_FRAMES} frames, got {video.shape[2]}")
        hidden = video  # (B, 3, T, 224, 224)
        for name, module in self.named_children():
            if name != "logits":
                hidden = module(hidden)  # at the end (B, 1024, T/8, 7, 7)
        return nn.functional.avg_pool3d(hidden, (self.pool_frames, 7, 7), stride=1)  # (B, 1024, T', 1, 1)


class _Unit(nn.Module):
    """Convolution, batch normalisation and ReLU; ``plain`` is a convolution with bias alone."""

    def __init__(self, narrow: int, wide: int, kernel: int, stride: int = 1, plain: bool = False) -> None:
        super().__init__()
        self.kernel, self.stride = (kernel,) * 3, (stride,) * 3
        self.conv3d = nn.Conv3d(narrow, wide, kernel, stride=stride, bias=plain)
        self.bn = None if plain else nn.BatchNorm3d(wide, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3d(_same(x, self.kernel, self.stride))
        return x if self.bn is None else nn.functional.relu(self.bn(x), inplace=True)


class _MaxPool(nn.Module):
    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        # Zeros are as good as minus infinity here: what is pooled has passed a ReLU.
        return nn.functional.max_pool3d(_same(x, self.kernel, self.stride), self.kernel, self.stride)


class _Mixed(nn.Module):
    """Four branches side by side, concatenated along the channels."""

    def __init__(self, width: int, branches: tuple[int, ...]) -> None:
        super().__init__()
        b0, b1a, b1b, b2a, b2b, b3b = branches
        self.b0 = _Unit(width, b0, 1)
        self.b1a, self.b1b = _Unit(width, b1a, 1), _Unit(b1a, b1b, 3)
        self.b2a, self.b2b = _Unit(width, b2a, 1), _Unit(b2a, b2b, 3)
        self.b3a, self.b3b = _MaxPool((3, 3, 3), (1, 1, 1)), _Unit(width, b3b, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))], dim=1)


def _same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """``x`` padded with zeros so that T, H and W become ``ceil(size / stride)``, an odd one at the end."""
    padding: list[int] = []
    for size, k, s in reversed(list(zip(x.shape[2:], kernel, stride, strict=True))):
        missing = max(k - s if size % s == 0 else k - size % s, 0)
        padding += [missing // 2, missing - missing // 2]
    return nn.functional.pad(x, padding) if any(padding) else x
