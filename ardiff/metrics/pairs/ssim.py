"""SSIM, the structural similarity of frames (Wang et al. 2004).

Shapes: F frames, H W pixels.
"""

import numpy as np

from ardiff.metrics.pairs.psnr import PEAK, squared_error
from ardiff.metrics.registry import PairedMetric, register_metric

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def ssim(original: np.ndarray, other: np.ndarray) -> float:
    """The mean structural similarity of frames (Wang et al. 2004, Eq. 13) over RGB channels; 1 for equal frames.

    The Gaussian window has 11x11 pixels and deviation 1.5 and weights the moments (no N - 1). The constants are
    (0.01 L)^2 and (0.03 L)^2 with L = 255. Only windows that lie inside the frame count.

    Raises:
        ValueError: The videos are not uint8 ``(F, H, W, 3)`` of one shape with H, W >= 11.
    """
    _check(original, other, WINDOW)
    taps = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / SIGMA) ** 2)
    taps /= taps.sum()
    return _mean_similarity(original.astype(np.float64), other.astype(np.float64), taps)


def _check(original: np.ndarray, other: np.ndarray, side: int) -> None:
    """Raises ValueError unless the videos are uint8 ``(F, H, W, 3)`` of one shape with H, W >= ``side``."""
    squared_error(original, other)
    if original.ndim != 4 or min(original.shape[1:3]) < side:
        raise ValueError(f"SSIM needs videos (F, H, W, 3) of at least {side} pixels a side, got {original.shape}")


def _mean_similarity(x: np.ndarray, y: np.ndarray, taps: np.ndarray, correction: float = 1.0) -> float:
    """The mean similarity of all windows of two videos, float64 ``(F, H, W, ...)`` each.

    ``correction`` multiplies variances and covariance: N / (N - 1) makes those of N evenly weighted pixels unbiased.
    """
    mean_x, mean_y = _windows(x, taps), _windows(y, taps)
    variance_x, variance_y = (correction * (_windows(v * v, taps) - mean**2) for v, mean in ((x, mean_x), (y, mean_y)))
    covariance = correction * (_windows(x * y, taps) - mean_x * mean_y)
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    similarity: np.ndarray = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return float(similarity.mean())


def _windows(x: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """Weighted means of all windows of k x k pixels inside the frames: ``(F, H, W, ...) -> (F, H - k + 1, ...)``."""
    for axis in (1, 2):
        size = x.shape[axis] - len(taps) + 1
        x = sum(tap * np.take(x, np.arange(i, i + size), axis=axis) for i, tap in enumerate(taps))
    return x


GREY = np.array([0.299, 0.587, 0.114])
"""Weights of R, G and B in the luma of Rec. 601, as Pillow and OpenCV have it."""
BOX = 7


def ssim_grey(original: np.ndarray, other: np.ndarray) -> float:
    """The mean structural similarity of grey frames with the defaults of scikit-image; 1 for equal frames.

    Every window of 7x7 pixels counts evenly, and variances are unbiased (N - 1). The AR-Diffusion authors' scripts
    compute this one.

    Raises:
        ValueError: The videos are not uint8 ``(F, H, W, 3)`` of one shape with H, W >= 7.
    """
    _check(original, other, BOX)
    x, y = ((video @ GREY).round() for video in (original, other))  # (F, H, W)
    return _mean_similarity(x, y, np.full(BOX, 1.0 / BOX), correction=BOX**2 / (BOX**2 - 1))


register_metric(PairedMetric(name="ssim-grey", function=ssim_grey, higher_is_better=True, min_size=BOX))
register_metric(PairedMetric(name="ssim", function=ssim, higher_is_better=True, min_size=WINDOW))
