"""The model as the engine runs it: as it is, packed for a CPU, or compiled. The parameters are shared, never changed.

Packed: a matrix product of few rows, one frame's tokens, spends a third of its time on rearranging the weights. oneDNN
lets the rearranged weights be kept; the operators are those that torch.compile emits for a frozen model.

Compiled: what a block does before and after its attention, as two graphs that all blocks share; the attention between
them reads the cache and stays what it is. Compilation takes about a minute at the first iterations.
"""

import copy
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from ardiff.dit import DiT, DiTBlock

Execution = Literal["plain", "packed", "compiled"]


class PackedLinear(nn.Module):
    """``nn.Linear`` for inference on a CPU, equal to it up to rounding. Packs at the first call; keeps both forms."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    @cached_property
    def weight(self) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(self.linear.weight.detach(), None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.linear.bias, "none", [], "")


def network(model: DiT, execution: Execution) -> DiT:
    """A model that shares the parameters of ``model`` and computes the same, up to rounding, in another way.

    Raises:
        ValueError: ``packed``, but the model is not on a CPU, or oneDNN cannot pack weights of its type there.
    """
    match execution:
        case "plain":
            return model
        case "packed":
            if not packable(model):
                raise ValueError("only float32 weights, and bfloat16 where oneDNN has it, on a CPU can be packed")
            twin = _twin(model)
            for module in list(twin.modules()):
                for name, child in module.named_children():
                    if isinstance(child, nn.Linear):
                        setattr(module, name, PackedLinear(child))
            return twin
        case "compiled":
            twin = _twin(model)
            for block in twin.blocks:
                assert isinstance(block, DiTBlock)
                block.before_attention = torch.compile(block.before_attention, dynamic=True)  # type: ignore[method-assign]
                block.after_attention = torch.compile(block.after_attention, dynamic=True)  # type: ignore[method-assign]
            return twin
        case _:
            raise ValueError(f"unknown execution {execution!r}")


def packable(model: nn.Module) -> bool:
    """Whether oneDNN has a layout for the model's weights where they are."""
    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if parameter.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return parameter.dtype == torch.float32


def _twin(model: DiT) -> DiT:
    """A copy whose modules are its own and whose parameters and buffers are the model's."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
