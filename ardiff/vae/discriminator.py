"""The discriminator of the adversarial stage: scores every patch of a frame (Isola et al., 2017).

Shapes: N packed frames, H W pixels, h w patches.
"""

import itertools

from torch import Tensor, nn

from ardiff.vae.config import DiscriminatorConfig


class PatchDiscriminator(nn.Module):
    """Frames ``(N, 3, H, W)`` in [-1, 1] to scores of overlapping patches ``(N, 1, h, w)``; high means real.

    It uses group norm instead of batch norm: a frame's scores depend neither on the other frames nor on the number of
    workers, and the model has no buffers.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        channels = [config.width * min(2**i, 8) for i in range(config.depth + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, channels[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (inputs, outputs) in enumerate(itertools.pairwise(channels), start=1):
            stride = 2 if i < config.depth else 1
            convolution = nn.Conv2d(inputs, outputs, 4, stride=stride, padding=1, bias=False)
            layers += [convolution, nn.GroupNorm(_num_groups(outputs), outputs), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(channels[-1], 1, 4, stride=1, padding=1))
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, frames: Tensor) -> Tensor:
        return self.layers(frames)  # (N, 1, h, w)


def _num_groups(channels: int) -> int:
    """The largest number of groups up to 32 that divides ``channels``."""
    return next(n for n in range(min(32, channels), 0, -1) if channels % n == 0)
