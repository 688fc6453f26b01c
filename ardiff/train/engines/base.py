"""The interface of an engine, and what all engines share."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ardiff import distributed
from ardiff.tensors import trainable
from ardiff.train.flops import recomputation
from ardiff.train.shards import ShardReader

ResultT = TypeVar("ResultT")
LOSS_SCALE = "scale/"
"""Name of fp16's loss scale among the optimizer's tensors: the scale, and the number of steps since it changed."""


class Engine(Protocol):
    """Owns a model, its optimizer state and its EMA. Every rank of a run holds one and makes the same calls."""

    model: nn.Module
    device: torch.device
    skeleton: nn.Module
    """A copy of the model without the weights that it trains, for evaluation."""

    def compute(self, function: Callable[[], ResultT]) -> ResultT:
        """Calls ``function``, which evaluates the model, in the engine's precision. Every training pass runs in it."""

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradients of ``loss``, the mean over this rank's samples."""

    def step(self, step: int, lr_factor: float) -> float:
        """Averages gradients over all ranks, clips them, updates weights and EMA, and clears the gradients.

        Returns the gradient norm before clipping. If it is not finite, nothing changes except fp16's loss scale.
        """

    def learning_rates(self) -> dict[str, float]:
        """Learning rates of the last update by the names of their settings: ``lr`` and, with Muon, ``muon_lr``."""

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """All tensors of a checkpoint as (group, name, whole tensor), in the same order on every rank.

        Groups: ``model`` and ``ema``, float32 by parameter name, and ``optimizer``, by ``KEY/PARAMETER``. Frozen
        parameters are in none of them.
        """

    def restore(self, shards: ShardReader) -> None:
        """Loads what :meth:`tensors` of this or another engine gave, on any number of ranks."""

    def ema_weights(self) -> dict[str, Tensor]:
        """The EMA of the trained parameters by name, float32, on the CPU. Empty on all ranks except 0."""


def ema_model(engine: Engine) -> nn.Module | None:
    """A copy of the engine's model with the EMA weights, in evaluation mode; None on all ranks except 0.

    Every rank must call it.
    """
    weights = engine.ema_weights()
    if distributed.rank() > 0:
        return None
    model = copy.deepcopy(engine.skeleton)
    on_device = {name: weight.to(engine.device) for name, weight in weights.items()}
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    model.load_state_dict({**frozen, **on_device}, strict=True, assign=True)
    return model.to(engine.device).eval()


def skeleton_of(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with its buffers and frozen parameters, and with the other parameters on the meta device.

    Call it before hooks are added.
    """
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in trainable(model).values()}
    return copy.deepcopy(model, empty).eval()


def checkpoint_activations(model: nn.Module) -> None:
    """Recomputes every block of ``model`` in the backward pass instead of keeping its activations."""
    for block in blocks_of(model):
        block.forward = functools.partial(
            checkpoint,
            block.forward,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (contextlib.nullcontext(), recomputation()),
        )


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of ``model``."""
    lists = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "blocks"]
    return [block for blocks in lists if isinstance(blocks, nn.ModuleList) for block in blocks]


class LossModule(nn.Module):
    """A module whose forward pass computes a whole loss, however the loss calls the model.

    Engines that shard weights prepare them in a module's forward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], ResultT]) -> ResultT:
        return function()


def optimizer_keys(shards: ShardReader) -> dict[str, list[str]]:
    """For each parameter, the keys under which the checkpoint holds optimizer state of it."""
    keys: dict[str, list[str]] = {}
    for entry in shards.names("optimizer"):
        key, _, name = entry.partition("/")
        if name:
            keys.setdefault(name, []).append(key)
    return keys
