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
    squared_error(original, other)
    if original.ndim != 4 or min(original.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs videos (F, H, W, 3) of at least {WINDOW} pixels a side, got {original.shape}")
    x, y = original.astype(np.float64), other.astype(np.float64)
    mean_x, mean_y = _window(x), _window(y)
    variance_x, variance_y = _window(x * x) - mean_x**2, _window(y * y) - mean_y**2
    covariance = _window(x * y) - mean_x * mean_y
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return float(similarity.mean())


def _window(x: np.ndarray) -> np.ndarray:
    """Gaussian-weighted means of all windows inside the frames: ``(F, H, W, 3) -> (F, H - 10, W - 10, 3)``."""
    taps = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / SIGMA) ** 2)
    taps /= taps.sum()
    for axis in (1, 2):
        size = x.shape[axis] - WINDOW + 1
        x = sum(tap * np.take(x, np.arange(i, i + size), axis=axis) for i, tap in enumerate(taps))
    return x


register_metric(PairedMetric(name="ssim", function=ssim, higher_is_better=True, min_size=WINDOW))
