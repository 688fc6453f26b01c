"""Linear layers by oneDNN on CPUs, for training and for inference.

torch multiplies float32 matrices with MKL, which uses only half of an AMD processor's AVX-512. The oneDNN inside torch
uses all of it. For inference, oneDNN can also keep the weights packed in its own layout; with few rows, such as one
frame's tokens, packing takes a third of a product's time. The operators are those that torch.compile emits for a frozen
model. Results differ from torch's by rounding only.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn


def available() -> bool:
    """Whether this build of torch has oneDNN."""
    return torch.backends.mkldnn.is_available()


def packable(model: nn.Module) -> bool:
    """Whether oneDNN can pack the model's weights: float32, or bfloat16 if the CPU supports it, on a CPU."""
    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or not available():
        return False
    if parameter.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return parameter.dtype == torch.float32


def pack_linear(model: nn.Module) -> None:
    """Replaces every ``nn.Linear`` inside ``model`` by a :class:`PackedLinear`, for inference."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child))


class PackedLinear(nn.Module):
    """``nn.Linear`` for inference on a CPU, equal up to rounding. Packs at the first call, keeps both forms."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    @functools.cached_property
    def weight(self) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(self.linear.weight.detach(), None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.linear.bias, "none", [], "")


def accelerate_linear(model: nn.Module) -> None:
    """Makes every ``nn.Linear`` of ``model`` use oneDNN where its input and weights are float32 on a CPU."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = functools.partial(_forward, module)  # type: ignore[method-assign]


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    plain = x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu")
    if plain or layer.weight.dtype != torch.float32:
        return nn.functional.linear(x, layer.weight, layer.bias)
    rows = _Linear.apply(x.flatten(0, -2), layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    return rows.unflatten(0, x.shape[:-1])


class _Linear(torch.autograd.Function):
    """``x (N, I), weight (O, I), bias (O,) or None -> x weight^T + bias (N, O)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            _product(gradient, weight.T) if for_x else None,
            _product(gradient.T, x.T) if for_weight else None,
            gradient.sum(dim=0) if for_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
