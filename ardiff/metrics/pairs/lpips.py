"""LPIPS with AlexNet or VGG16 (Zhang et al. 2018), the learned perceptual distance of frames.

``lpips`` is the one that its authors recommend for evaluation. The AR-Diffusion authors' scripts use ``lpips-vgg``.

Shapes: F frames, H W pixels.
"""

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ardiff.metrics.networks.lpips import LPIPS, LPIPS_ALEX, LPIPS_VGG
from ardiff.metrics.registry import PairedMetric, register_metric


def mean_lpips(original: np.ndarray, other: np.ndarray, model: LPIPS) -> float:
    """The mean over frames of the distance of two videos, uint8 ``(F, H, W, 3)``."""
    first, second = (_to_tensor(video, model.shift.device) for video in (original, other))
    return float(model(first, second).mean())


def _to_tensor(video: np.ndarray, device: torch.device) -> Tensor:
    return rearrange(torch.from_numpy(video).to(device), "f h w c -> f c h w").float() / 127.5 - 1.0


register_metric(
    # Below 32 pixels AlexNet's poolings have nothing left.
    PairedMetric(name="lpips", function=mean_lpips, network=LPIPS_ALEX, min_size=32, value_range="[-1, 1]")
)
register_metric(
    PairedMetric(name="lpips-vgg", function=mean_lpips, network=LPIPS_VGG, min_size=16, value_range="[-1, 1]")
)
