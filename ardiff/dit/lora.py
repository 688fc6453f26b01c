"""Low-rank adaptation (LoRA) of the AR-DiT: ``W x + (alpha / r) B A x`` with a frozen ``W`` (Hu et al., 2021, Eq. 3).

Shapes: r rank, I and O the widths of a linear layer's input and output.
"""

import re
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from ardiff.dit.config import LoRAConfig
from ardiff.dit.model import DiT
from ardiff.errors import CheckpointError

LORA_A = ".lora_A.weight"


class LoRALinear(nn.Module):
    """A linear layer and its low-rank update, ``(..., I) -> (..., O)``. The update starts at zero."""

    def __init__(self, linear: nn.Linear, config: LoRAConfig) -> None:
        super().__init__()
        self.base_layer = linear
        self.lora_A = nn.Linear(linear.in_features, config.rank, bias=False)  # weight (r, I)
        self.lora_B = nn.Linear(config.rank, linear.out_features, bias=False)  # weight (O, r)
        self.scale = config.scale
        nn.init.kaiming_uniform_(self.lora_A.weight, a=5**0.5)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x) + self.scale * self.lora_B(self.lora_A(x))
        return result


def target_pattern(config: LoRAConfig) -> str:
    """A regular expression that matches the names of the adapted layers in whole."""
    return rf"blocks\.\d+\.(.+\.)?({'|'.join(config.layers)})"


def add_lora(model: DiT, config: LoRAConfig) -> None:
    """Freezes ``model`` and adds trainable updates to the layers that ``config`` names, in place.

    Raises:
        CheckpointError: The model has none of these layers.
    """
    model.requires_grad_(False)
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(target_pattern(config), name)
    ]
    if not targets:
        raise CheckpointError(f"The model's blocks have no linear layer named {', '.join(config.layers)}.")
    for name in targets:
        parent, _, child = name.rpartition(".")
        module = model.get_submodule(parent)
        setattr(module, child, LoRALinear(getattr(module, child), config))


def updates(weights: Mapping[str, Tensor], scale: float) -> Iterator[tuple[str, Tensor]]:
    """What an adapter adds to the weights ``(O, I)`` of linear layers, by their names, in float32.

    Args:
        weights: ``LAYER.lora_A.weight (r, I)`` and ``LAYER.lora_B.weight (O, r)`` of each adapted layer.
        scale: ``alpha / r``.
    """
    for name, a in weights.items():
        if name.endswith(LORA_A):
            layer = name.removesuffix(LORA_A)
            yield f"{layer}.weight", scale * (weights[f"{layer}.lora_B.weight"].float() @ a.float())


def merged(base: Mapping[str, Tensor], weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The weights of the adapted layers with an adapter's updates added, see :func:`updates`.

    Raises:
        CheckpointError: ``base`` has no such layer, or it is of another size.
    """
    result = {}
    for name, update in updates(weights, scale):
        shape = tuple(base[name].shape) if name in base else "missing"
        if shape != tuple(update.shape):
            raise CheckpointError(
                f"The adapter does not fit the model: {name} is {tuple(update.shape)} in the adapter, {shape} in the "
                "model."
            )
        result[name] = (base[name].float() + update.to(base[name].device)).to(base[name].dtype)
    return result
