"""The Inception-v3 of FID, as trained in 2015 (Szegedy et al.; Heusel et al., 2017).

It differs from torchvision's: average pooling does not count the padding, and the last block uses max pooling.

Shapes: N images, H W pixels, C channels.
"""

from typing import Literal

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from ardiff.metrics.registry import Extractor, register_network

Pool = Literal["average", "max"]


class FIDInception(nn.Module):
    """2048 pooled features of images. Parameters have the public names (``Mixed_5b.branch1x1.conv.weight``).

    The classifier ``fc`` is part of the weights but unused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Unit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = _Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = _Unit(80, 192, 3)
        self.Mixed_5b = _A(192, 32)
        self.Mixed_5c = _A(256, 64)
        self.Mixed_5d = _A(288, 64)
        self.Mixed_6a = _B(288)
        self.Mixed_6b = _C(128)
        self.Mixed_6c = _C(160)
        self.Mixed_6d = _C(160)
        self.Mixed_6e = _C(192)
        self.Mixed_7a = _D(768)
        self.Mixed_7b = _E(1280, "average")
        self.Mixed_7c = _E(2048, "max")
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: Tensor) -> Tensor:
        """Features, averaged over space.

        Args:
            images: float ``(N, 3, 299, 299)``, ``(x - 128) / 128`` of pixels of 0 to 255.

        Returns:
            ``(N, 2048)`` of the same dtype.

        Raises:
            ValueError: Another shape.
        """
        x = self._stem(images)  # (N, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (N, 192, 71, 71)
        x = nn.functional.max_pool2d(x, 3, stride=2)  # (N, 192, 35, 35)
        for name, module in self.named_children():
            if name.startswith("Mixed"):
                x = module(x)  # at the end (N, 2048, 8, 8)
        return reduce(x, "n c h w -> n c", "mean")

    def first_pool(self, images: Tensor) -> Tensor:
        """The 64 features of the first pooling, averaged over space: ``(N, 3, 299, 299) -> (N, 64)``."""
        return reduce(self._stem(images), "n c h w -> n c", "mean")

    def _stem(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, 299, 299):
            raise ValueError(f"Inception takes images of shape (N, 3, 299, 299), not {tuple(images.shape)}")
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))  # (N, 64, 147, 147)
        return nn.functional.max_pool2d(x, 3, stride=2)


class _Unit(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(
        self, narrow: int, wide: int, kernel: int | tuple[int, int], stride: int = 1, padding: int | tuple[int, int] = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(narrow, wide, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(wide, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.bn(self.conv(x)), inplace=True)


def _wide(narrow: int, wide: int) -> _Unit:
    return _Unit(narrow, wide, (1, 7), padding=(0, 3))


def _tall(narrow: int, wide: int) -> _Unit:
    return _Unit(narrow, wide, (7, 1), padding=(3, 0))


def _average(x: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _A(nn.Module):
    def __init__(self, width: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Unit(width, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = _Unit(width, 48, 1), _Unit(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Unit(width, 64, 1)
        self.branch3x3dbl_2, self.branch3x3dbl_3 = _Unit(64, 96, 3, padding=1), _Unit(96, 96, 3, padding=1)
        self.branch_pool = _Unit(width, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        five = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_average(x))], dim=1)


class _B(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch3x3 = _Unit(width, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Unit(width, 64, 1)
        self.branch3x3dbl_2, self.branch3x3dbl_3 = _Unit(64, 96, 3, padding=1), _Unit(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, nn.functional.max_pool2d(x, 3, stride=2)], dim=1)


class _C(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.branch1x1 = _Unit(768, 192, 1)
        self.branch7x7_1 = _Unit(768, c, 1)
        self.branch7x7_2, self.branch7x7_3 = _wide(c, c), _tall(c, 192)
        self.branch7x7dbl_1 = _Unit(768, c, 1)
        self.branch7x7dbl_2, self.branch7x7dbl_3 = _tall(c, c), _wide(c, c)
        self.branch7x7dbl_4, self.branch7x7dbl_5 = _tall(c, c), _wide(c, 192)
        self.branch_pool = _Unit(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average(x))], dim=1)


class _D(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = _Unit(width, 192, 1), _Unit(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Unit(width, 192, 1)
        self.branch7x7x3_2, self.branch7x7x3_3 = _wide(192, 192), _tall(192, 192)
        self.branch7x7x3_4 = _Unit(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_2(self.branch7x7x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(seven))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, nn.functional.max_pool2d(x, 3, 2)], dim=1)


class _E(nn.Module):
    def __init__(self, width: int, pool: Pool) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = _Unit(width, 320, 1)
        self.branch3x3_1 = _Unit(width, 384, 1)
        self.branch3x3_2a = _Unit(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = _Unit(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Unit(width, 448, 1), _Unit(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Unit(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = _Unit(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = _Unit(width, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = _average(x) if self.pool == "average" else nn.functional.max_pool2d(x, 3, stride=1, padding=1)
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ]
        return torch.cat(branches, dim=1)


def _features(model: nn.Module, frames: Tensor, count: int) -> Tensor:
    """One row of 2048 features per frame: ``(n F, 3, 299, 299)`` to ``(n, F, 2048)``."""
    return rearrange(model(frames), "(n f) d -> n f d", n=count)


INCEPTION_EXTRACTOR = Extractor(
    name="inception",
    build=FIDInception,
    size=299,
    value_range="(x - 128) / 128",
    features=_features,
    per_frame=True,
)
register_network(INCEPTION_EXTRACTOR)
