"""From decoded clips to features, as a recipe says.

Shapes: n clips, F frames, H W pixels, k rows of D features per clip.
"""

from collections.abc import Mapping

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ardiff.data.encode import reencode_mpeg4
from ardiff.errors import ConfigError
from ardiff.metrics.networks.i3d import I3D, MIN_FRAMES
from ardiff.metrics.networks.inception import FIDInception
from ardiff.metrics.networks.resnet3d import MEAN_RGB, SEGMENT, ResNet3D50
from ardiff.metrics.preprocess import resize_frames, scale_range
from ardiff.metrics.protocol import Recipe
from ardiff.metrics.weights import fill_network


class Extractor:
    """A recipe's network on a device. On a CPU clips go through it one by one, so batches leave no trace in features.

    Args:
        recipe: What to extract.
        state: The network's weights.
        device: Where to compute; float32 without TensorFloat-32 everywhere.
    """

    def __init__(self, recipe: Recipe, state: Mapping[str, Tensor], device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        match recipe.network:
            case "i3d":
                model: torch.nn.Module = I3D(recipe.pool_frames)
            case "inception":
                model = FIDInception()
            case "resnet3d":
                model = ResNet3D50()
            case _:
                raise ValueError(f"{recipe.network} extracts no features")
        self.model = fill_network(model, state, recipe.network).to(device)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.deterministic = True

    @torch.no_grad()
    def __call__(self, clips: np.ndarray) -> np.ndarray:
        """Features of clips, uint8 ``(n, F, H, W, 3)`` to float32 ``(n, k, D)``."""
        if self.recipe.reencode:
            clips = np.stack([reencode_mpeg4(clip) for clip in clips])
        step = 1 if self.device.type == "cpu" else len(clips)
        parts = [self._features(torch.from_numpy(clips[i : i + step])) for i in range(0, len(clips), step)]
        return torch.cat(parts).float().cpu().numpy()

    def _features(self, clips: Tensor) -> Tensor:
        count = len(clips)
        frames = rearrange(clips.to(self.device), "n f h w c -> (n f) h w c")
        pixels = resize_frames(frames, self.recipe.size, self.recipe.resize)
        inputs = scale_range(pixels, self.recipe.value_range, MEAN_RGB)  # (n F, 3, S, S)
        match self.recipe.network:
            case "i3d":
                return self.model(rearrange(inputs, "(n f) c h w -> n c f h w", n=count))[:, None]  # (n, 1, 400)
            case "inception":
                return rearrange(self.model(inputs), "(n f) d -> n f d", n=count)  # (n, F, 2048)
            case _:
                segments = rearrange(inputs, "(n s t) c h w -> (n s) c t h w", n=count, t=SEGMENT)
                features = rearrange(self.model(segments), "(n s) d -> n s d", n=count)
                return features.mean(dim=1, keepdim=True)  # (n, 1, 2048)


def check_frames(recipe: Recipe, num_frames: int) -> None:
    """Raises ConfigError if clips of ``num_frames`` frames cannot go through the recipe's network."""
    if recipe.network == "i3d" and num_frames < MIN_FRAMES:
        raise ConfigError(f"I3D needs clips of at least {MIN_FRAMES} frames, got {num_frames}: raise --frames.")
    if recipe.network == "resnet3d" and num_frames % SEGMENT:
        raise ConfigError(f"FID-vid takes segments of {SEGMENT} frames, and {num_frames} is no multiple of that.")
