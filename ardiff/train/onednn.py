"""Linear layers by oneDNN in float32 training on CPUs.

torch multiplies float32 matrices with MKL, which leaves half of an AMD processor's AVX-512 unused; the oneDNN inside
torch does not. The products are the same but for rounding.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn


def available() -> bool:
    """Whether this build of torch has oneDNN."""
    return torch.backends.mkldnn.is_available()


def accelerate_linear(model: nn.Module) -> None:
    """Has every ``nn.Linear`` of ``model`` compute by oneDNN wherever its input and weights are float32 on a CPU."""
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
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, _, for_bias = ctx.needs_input_grad
        return (
            _product(gradient, weight.T) if for_x else None,
            _product(gradient.T, x.T),
            gradient.sum(dim=0) if for_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
