"""Extracts features from decoded clips, as a :class:`~ardiff.metrics.registry.MetricSpec` says.

Shapes: n clips, F frames, H W pixels, k rows of D features per clip.
"""

from collections.abc import Mapping

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from ardiff.data.encode import reencode_mpeg4
from ardiff.errors import ConfigError
from ardiff.metrics.compiled import Backend, OpenVINO
from ardiff.metrics.preprocess import resize_frames, scale_range
from ardiff.metrics.registry import Extractor, MetricSpec
from ardiff.metrics.weights import compute_exactly, restore
from ardiff.resolution import Resolution


class FeatureExtractor:
    """A feature network on a device.

    On a CPU it processes clips one by one, so features do not depend on the batch.

    Args:
        spec: The network and the preprocessing.
        state: The network's weights.
        device: Where to compute, in float32 without TensorFloat-32.
        backend: What computes the network on CPUs.

    Raises:
        ConfigError: OpenVINO is not installed, or cannot compute the network.
    """

    def __init__(
        self, spec: MetricSpec, state: Mapping[str, Tensor], device: torch.device, backend: Backend = "torch"
    ) -> None:
        self.spec, self.device = spec, device
        model = restore(spec.network, state, spec.network.name, **spec.options)
        self.model = _with_backend(spec.network, model, device, backend).to(device)
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


def _with_backend(network: Extractor, model: nn.Module, device: torch.device, backend: Backend) -> nn.Module:
    match backend:
        case "torch":
            return network.prepare(model)
        case "openvino":
            if device.type != "cpu":
                raise ConfigError("OpenVINO computes on CPUs: use device=cpu, or backend=torch.")
            if network.prepare_openvino is None:
                raise ConfigError(f"OpenVINO does not compute the network '{network.name}': use backend=torch.")
            return OpenVINO(network.prepare_openvino(model))
        case _:
            raise ValueError(f"unknown backend: {backend!r}")
