"""The model as the engine runs it: as it is, packed for a CPU, or compiled. The parameters are shared, never changed.

Packed: the weights of linear layers are kept as oneDNN arranges them (:mod:`ardiff.onednn`).

Compiled: what a block does before and after its attention, as two graphs that all blocks share; the attention between
them reads the cache and stays what it is. Compilation takes about a minute at the first iterations.
"""

import copy
from typing import Literal

import torch

from ardiff import onednn
from ardiff.dit import DiT, DiTBlock

Execution = Literal["plain", "packed", "compiled"]


def network(model: DiT, execution: Execution) -> DiT:
    """A model that shares the parameters of ``model`` and computes the same, up to rounding, in another way.

    Raises:
        ValueError: ``packed``, but the model is not on a CPU, or oneDNN cannot pack weights of its type there.
    """
    match execution:
        case "plain":
            return model
        case "packed":
            if not onednn.packable(model):
                raise ValueError("only float32 weights, and bfloat16 where oneDNN has it, on a CPU can be packed")
            twin = _twin(model)
            onednn.pack_linear(twin)
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


def _twin(model: DiT) -> DiT:
    """A copy whose modules are its own and whose parameters and buffers are the model's."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
