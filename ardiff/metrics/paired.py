"""Measures videos against their originals by paired metrics.

Shapes: n pairs, F frames, H W pixels, M metrics.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ardiff.errors import DataError
from ardiff.metrics.registry import PairedMetric
from ardiff.metrics.weights import compute_exactly, fill_network


class PairMeasure:
    """Computes paired metrics on a device. ``states`` has the weights of the metrics' networks by name."""

    def __init__(
        self, metrics: Sequence[PairedMetric], states: Mapping[str, Mapping[str, Tensor]], device: torch.device
    ) -> None:
        compute_exactly()
        self.metrics = metrics
        self.models = [
            [] if m.network is None else [fill_network(m.network.build(), states[m.network.name], m.name).to(device)]
            for m in metrics
        ]

    @torch.no_grad()
    def __call__(self, pairs: np.ndarray) -> np.ndarray:
        """uint8 ``(n, 2, F, H, W, 3)``, originals first, to float32 ``(n, 1, M)``.

        Raises:
            DataError: The frames are too small for a metric.
        """
        for metric in self.metrics:
            if min(pairs.shape[3:5]) < metric.min_size:
                size = f"{pairs.shape[4]}x{pairs.shape[3]}"
                raise DataError(f"The videos are {size}, too small: {metric.name} needs at least {metric.min_size}.")
        values = [
            [[m.function(original, other, *model) for m, model in zip(self.metrics, self.models, strict=True)]]
            for original, other in pairs
        ]
        return np.array(values, dtype=np.float32)
