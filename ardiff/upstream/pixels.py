"""The pixel decoder of TiTok and of the authors' AR-VAE: a soft choice of image codes, then convolutions.

Sizes are those of the MaskGIT-VQGAN decoder (Chang et al., 2022), on which TiTok builds; a patch has 16 x 16 pixels.

Shapes: N packed frames, P = h w patches per frame, C width, H W pixels, I and O channels of a block.
"""

from einops import rearrange
from torch import Tensor, nn

from ardiff.upstream.config import UpstreamAutoencoderConfig

NUM_CODES = 1024
CODE_DIM = 256
CHANNELS = (512, 256, 256, 128, 128)
"""Channels at each resolution, from patches to pixels; each resolution is twice the one before."""


class ConvolutionalPixels(nn.Module):
    """Decoded patches ``(N, P, C)`` to frames ``(N, 3, H, W)``, about in [0, 1]."""

    def __init__(self, config: UpstreamAutoencoderConfig) -> None:
        super().__init__()
        self.rows, _ = config.patch_grid()
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
        x = rearrange(x, "n (h w) c -> n c h w", h=self.rows)  # (N, 256, h, w)
        x = self.middle(self.conv_in(x))  # (N, 512, h, w)
        for stage in self.stages:
            x = stage(x)  # (N, channels, 2 h, 2 w), and so on
        return self.conv_out(nn.functional.silu(self.norm(x)))  # (N, 3, H, W)


class Stage(nn.Module):
    """Two residual blocks, then, except at the last resolution, an upsampling by two."""

    def __init__(self, inputs: int, outputs: int, last: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(ResidualBlock(inputs, outputs), ResidualBlock(outputs, outputs))
        self.upsample = None if last else nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)  # (N, O, h, w)
        if self.upsample is None:
            return x
        return self.upsample(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))  # (N, O, 2 h, 2 w)


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut. Where channels change, the shortcut projects *the block's own output*.

    The weights were trained so, and their shapes allow nothing else: such a block has no identity path.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(32, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(32, outputs, eps=1e-6)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = None if inputs == outputs else nn.Conv2d(outputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(nn.functional.silu(self.norm1(x)))  # (N, O, h, w)
        y = self.conv2(nn.functional.silu(self.norm2(y)))  # (N, O, h, w)
        return y + (x if self.shortcut is None else self.shortcut(y))
