"""MSE as papers on video prediction give it: the squared error of a frame, summed over its pixels.

Shapes: F frames, H W pixels.
"""

import numpy as np

from ardiff.metrics.pairs.psnr import PEAK, squared_error
from ardiff.metrics.registry import PairedMetric, register_metric


def frame_mse(original: np.ndarray, other: np.ndarray) -> float:
    """The mean over frames and colours of the squared error of values from 0 to 1, summed over the pixels of a frame.

    Raises:
        ValueError: The videos are not uint8 ``(F, H, W, 3)`` of one shape.
    """
    return float(squared_error(original, other).sum(axis=(1, 2)).mean() / PEAK**2)


register_metric(PairedMetric(name="mse", function=frame_mse, value_range="[0, 1]"))
