"""Extracts features from decoded clips, as a :class:`~ardiff.metrics.registry.MetricSpec` says.

Shapes: n clips, F frames, H W pixels, k rows of D features per clip.
"""

from collections.abc import Mapping

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ardiff.data.encode import reencode_mpeg4
from ardiff.metrics.preprocess import resize_frames, scale_range
from ardiff.metrics.registry import MetricSpec
from ardiff.metrics.weights import compute_exactly, restore
from ardiff.resolution import Resolution


class FeatureExtractor:
    """A feature network on a device.

    On a CPU it processes clips one by one, so features do not depend on the batch.

    Args:
        spec: The network and the preprocessing.
        state: The network's weights.
        device: Where to compute, in float32 without TensorFloat-32.
    """

    def __init__(self, spec: MetricSpec, state: Mapping[str, Tensor], device: torch.device) -> None:
        self.spec, self.device = spec, device
        model = restore(spec.network, state, spec.network.name, **spec.options)
        self.model = spec.network.prepare(model).to(device)
        compute_exactly()

    @torch.no_grad()
    def __call__(self, clips: np.ndarray) -> np.ndarray:
        """Features of clips, uint8 ``(n, F, H, W, 3)`` to float32 ``(n, k, D)``."""
        if self.spec.reencode:
            clips = np.stack([reencode_mpeg4(clip) for clip in clips])
        step = 1 if self.device.type == "cpu" else len(clips)
        features = [self._features(torch.from_numpy(clips[i : i + step])) for i in range(0, len(clips), step)]
        return torch.cat(features).float().cpu().numpy()

    def _features(self, clips: Tensor) -> Tensor:
        network = self.spec.network
        frames = rearrange(clips.to(self.device), "n f h w c -> (n f) h w c")
        pixels = resize_frames(frames, Resolution.square(network.size), self.spec.resize)
        inputs = scale_range(pixels, network.value_range, network.mean_rgb)  # (n F, 3, S, S)
        return network.features(self.model, inputs, len(clips))
