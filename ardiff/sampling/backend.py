"""Backends: ways to run the model in the engine. All share the model's parameters and never change them.

``packed`` keeps the weights of linear layers in oneDNN's own layout (:mod:`ardiff.onednn`).

``compiled`` compiles the parts of a block before and after its attention into two graphs (three if it reads
text), which all blocks share. The attention between them reads the cache and is not compiled. Compilation takes about a
minute in the first iterations.
"""

import copy

import torch

from ardiff import onednn
from ardiff.dit import DiT, DiTBlock
from ardiff.dit.blocks import TextBlock
from ardiff.sampling.config import Backend


def prepare_model(model: DiT, backend: Backend) -> DiT:
    """A model that shares the parameters of ``model`` and computes the same, up to rounding, with ``backend``.

    Raises:
        ValueError: The backend is ``packed``, but the model is not on a CPU, or oneDNN cannot pack its type there.
    """
    match backend:
        case "plain":
            return model
        case "packed":
            if not onednn.packable(model):
                raise ValueError("only float32 weights, and bfloat16 where oneDNN has it, on a CPU can be packed")
            packed = _share_parameters(model)
            onednn.pack_linear(packed)
            return packed
        case "compiled":
            compiled = _share_parameters(model)
            for block in compiled.blocks:
                assert isinstance(block, DiTBlock)
                block.before_attention = torch.compile(block.before_attention, dynamic=True)  # type: ignore[method-assign]
                block.after_attention = torch.compile(block.after_attention, dynamic=True)  # type: ignore[method-assign]
                if isinstance(block, TextBlock):
                    block.before_text = torch.compile(block.before_text, dynamic=True)  # type: ignore[method-assign]
                    block.after_text = torch.compile(block.after_text, dynamic=True)  # type: ignore[method-assign]
            return compiled
        case _:
            raise ValueError(f"unknown backend {backend!r}")


def _share_parameters(model: DiT) -> DiT:
    """A copy with modules of its own that uses the parameters and buffers of ``model``."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
