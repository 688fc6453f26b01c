"""Reconstructions of real clips by an AR-VAE, made where they are measured: no files lie between."""

import functools

import numpy as np
import torch

from ardiff.data.transforms import to_uint8, to_unit
from ardiff.errors import DataError
from ardiff.pretrained import load_autoencoder
from ardiff.resolution import Resolution
from ardiff.vae import ARAutoencoder

NAME = "reconstruction"
"""The set's name."""
CODEC = "ar-vae"
"""What stands in a protocol for the codec of reconstructions."""


@torch.no_grad()
def reconstruct(vae: ARAutoencoder, videos: np.ndarray) -> np.ndarray:
    """Encodes and decodes videos, uint8 ``(n, F, H, W, 3)``, without noise.

    Raises DataError if the AR-VAE is for frames of another shape.
    """
    shape, known = Resolution(*videos.shape[2:4]), vae.config.shapes
    if shape not in known:
        raise DataError(
            f"The AR-VAE is for frames of {' or '.join(map(str, known))}, height x width, but the clips have {shape}: "
            f"give --resolution {known[0].height},{known[0].width}."
        )
    device = next(vae.parameters()).device
    means = vae.encode(to_unit(torch.from_numpy(videos).to(device))).mean
    return to_uint8(vae.decode_long(means, shape=shape)).cpu().numpy()


class Reconstructor:
    """Reconstructs clips with the AR-VAE of a folder.

    On a CPU it takes them one by one, so results do not depend on the batch.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._load = functools.cache(lambda uri: load_autoencoder(uri).to(device))

    def __call__(self, uri: str, videos: np.ndarray) -> np.ndarray:
        """The reconstructions of videos, uint8 ``(n, F, H, W, 3)``, by the AR-VAE in the folder ``uri``."""
        step = 1 if self.device.type == "cpu" else len(videos)
        parts = [reconstruct(self._load(uri), videos[i : i + step]) for i in range(0, len(videos), step)]
        return np.concatenate(parts)
