"""PSNR, the peak signal-to-noise ratio.

Shapes: F frames, H W pixels.
"""

import numpy as np

from ardiff.metrics.registry import PairedMetric, register_metric

PEAK = 255.0
MAX_PSNR = 100.0
"""dB. The PSNR of equal frames is infinite, and so is every mean that contains one."""


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """``10 log10(255^2 / mean squared error)`` over all elements, in dB; infinite for equal arrays.

    Args:
        a: uint8 of any shape. b: uint8 of the same shape.

    Raises:
        ValueError: Another dtype, different shapes, or no elements.
    """
    error = squared_error(a, b).mean()
    return float("inf") if error == 0 else float(10.0 * np.log10(PEAK**2 / error))


def frame_psnr(original: np.ndarray, other: np.ndarray) -> float:
    """The mean over frames of ``10 log10(255^2 / mean squared error)``, in dB, of uint8 ``(F, H, W, 3)``.

    Equal frames count as ``MAX_PSNR``. :func:`psnr` takes the mean of the error instead, so that one good frame does
    not raise it.

    Raises:
        ValueError: The videos are not uint8 of one shape.
    """
    error = squared_error(original, other).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return float(np.minimum(10.0 * np.log10(PEAK**2 / error), MAX_PSNR).mean())


def squared_error(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared differences in float64. Raises ValueError unless both are uint8, of one shape and not empty."""
    if a.dtype != np.uint8 or b.dtype != np.uint8 or a.shape != b.shape or a.size == 0:
        raise ValueError(f"expected two uint8 arrays of one shape, got {a.dtype} {a.shape} and {b.dtype} {b.shape}")
    return (a.astype(np.float64) - b) ** 2


register_metric(PairedMetric(name="psnr", function=frame_psnr, unit="dB", higher_is_better=True))
