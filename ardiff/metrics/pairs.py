"""Videos against their originals: PSNR, SSIM and LPIPS of each pair.

Shapes: n pairs, F frames, H W pixels.
"""

from collections.abc import Mapping

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ardiff.errors import DataError
from ardiff.metrics.lpips import LPIPS
from ardiff.metrics.quality import WINDOW, frame_psnr, ssim
from ardiff.metrics.weights import fill_network
from ardiff.randomness import numpy_generator

LEAST_FOR_LPIPS = 32
"""Pixels a side below which AlexNet's poolings have nothing left."""


class PairMeasure:
    """Measures pairs on a device; LPIPS (AlexNet) only if its weights are given."""

    COLUMNS = ("psnr", "ssim", "lpips")

    def __init__(self, state: Mapping[str, Tensor] | None, device: torch.device) -> None:
        self.device = device
        self.lpips = None if state is None else fill_network(LPIPS("alex"), state, "lpips-alex").to(device)

    @torch.no_grad()
    def __call__(self, pairs: np.ndarray) -> np.ndarray:
        """uint8 ``(n, 2, F, H, W, 3)``, originals first, to float32 ``(n, 1, 3)``: the ``COLUMNS``; 2 without LPIPS.

        Raises:
            DataError: The frames are too small.
        """
        least = WINDOW if self.lpips is None else LEAST_FOR_LPIPS
        if min(pairs.shape[3:5]) < least:
            raise DataError(f"The videos are {pairs.shape[4]}x{pairs.shape[3]}, too small: at least {least} a side.")
        rows = []
        for original, other in pairs:
            row = [frame_psnr(original, other), ssim(original, other)]
            if self.lpips is not None:
                sides = [self._unit(video) for video in (original, other)]
                row.append(float(self.lpips(*sides).mean()))
            rows.append([row])
        return np.array(rows, dtype=np.float32)

    def _unit(self, video: np.ndarray) -> Tensor:
        return rearrange(torch.from_numpy(video).to(self.device), "f h w c -> f c h w").float() / 127.5 - 1.0


def resampled_mean(values: np.ndarray, seed: int, index: int) -> float:
    """Mean of bootstrap resample ``index`` of values ``(V,)``."""
    drawn = numpy_generator("bootstrap", seed, index).integers(len(values), size=len(values))
    return float(values[drawn].mean(dtype=np.float64))
