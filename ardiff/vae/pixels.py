"""The pixel decoder of TiTok and of the authors' AR-VAE: a soft choice among image codes, then convolutions.

Sizes are those of the MaskGIT-VQGAN decoder (Chang et al., 2022) that TiTok builds on; a patch has 16 x 16 pixels.

Shapes: N packed frames, P = h w patches a frame, C width, H W pixels.
"""

from einops import rearrange
from torch import Tensor, nn

from ardiff.vae.config import AutoencoderConfig

NUM_CODES = 1024
CODE_DIM = 256
CHANNELS = (512, 256, 256, 128, 128)
"""Channels of each resolution, from the patches' to the pixels': every one doubles the one before."""


class ConvolutionalPixels(nn.Module):
    """Decoded patches ``(N, P, C)`` to frames ``(N, 3, H, W)``, of which values in [0, 1] are meant."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.side = config.resolution // config.patch_size
        self.logits = nn.Sequential(
            nn.Linear(config.width, 2 * config.width), nn.Tanh(), nn.Linear(2 * config.width, NUM_CODES)
        )
        self.codes = nn.Linear(NUM_CODES, CODE_DIM)
        self.conv_in = nn.Conv2d(CODE_DIM, CHANNELS[0], 3, padding=1)
        self.middle = nn.Sequential(*(ResidualBlock(CHANNELS[0], CHANNELS[0]) for _ in range(2)))
        inputs = (CHANNELS[0], *CHANNELS)
        self.stages = nn.ModuleList(
            Stage(inputs[i], channels, last=i == len(CHANNELS) - 1) for i, channels in enumerate(CHANNELS)
        )
        self.norm = nn.GroupNorm(32, CHANNELS[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(CHANNELS[-1], 3, 3, padding=1)

    def forward(self, patches: Tensor) -> Tensor:
        x = self.codes(self.logits(patches).softmax(dim=-1))  # (N, P, 256)
        x = rearrange(x, "n (h w) c -> n c h w", h=self.side)
        x = self.middle(self.conv_in(x))  # (N, 512, h, w)
        for stage in self.stages:
            x = stage(x)
        return self.conv_out(nn.functional.silu(self.norm(x)))  # (N, 3, H, W)


class Stage(nn.Module):
    """Two residual blocks and, except at the last resolution, a doubling of it."""

    def __init__(self, inputs: int, outputs: int, last: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(ResidualBlock(inputs, outputs), ResidualBlock(outputs, outputs))
        self.upsample = None if last else nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        if self.upsample is None:
            return x
        return self.upsample(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResidualBlock(nn.Module):
    """Two convolutions with a shortcut; where it narrows, the shortcut is a projection *of the block's own output*.

    That is how the weights were trained (their shapes allow nothing else): nothing passes such a block by.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(32, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(32, outputs, eps=1e-6)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = None if inputs == outputs else nn.Conv2d(outputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(nn.functional.silu(self.norm1(x)))
        y = self.conv2(nn.functional.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(y))
