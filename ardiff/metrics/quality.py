"""Fidelity of frames to their originals: PSNR and SSIM. LPIPS is in :mod:`ardiff.metrics.lpips`.

Shapes: F frames, H W pixels. Videos are uint8 ``(F, H, W, 3)``.
"""

import numpy as np

from ardiff.metrics.stats import squared_error

WINDOW, SIGMA = 11, 1.5
K1, K2, PEAK = 0.01, 0.03, 255.0
MAX_PSNR = 100.0
"""dB. The PSNR of equal frames is infinite, and so would be every mean with one of them."""


def frame_psnr(original: np.ndarray, other: np.ndarray) -> float:
    """Mean over frames of ``10 log10(255^2 / mean squared error)``, in dB; equal frames count as ``MAX_PSNR``.

    :func:`ardiff.metrics.stats.psnr` is of the mean error instead, which one good frame cannot lift.

    Raises:
        ValueError: They are not uint8 videos of one shape.
    """
    error = squared_error(original, other).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return float(np.minimum(10.0 * np.log10(PEAK**2 / error), MAX_PSNR).mean())


def ssim(original: np.ndarray, other: np.ndarray) -> float:
    """Mean structural similarity of frames (Wang et al. 2004, Eq. 13), over RGB channels.

    Gaussian window of 11x11 with deviation 1.5, moments weighted by it (no N - 1), constants (0.01 L)^2 and (0.03 L)^2
    with L = 255, places where the window lies inside the frame. 1 for equal frames.

    Raises:
        ValueError: They are not uint8 videos of one shape with H, W >= 11.
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
