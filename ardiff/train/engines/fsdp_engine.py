"""The FSDP engine: torch's ``fully_shard`` shards weights, gradients, optimizer state and EMA over the ranks.

Every tensor keeps its shape and is split along its first axis (a DTensor), so that Muon can gather a whole matrix.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate

from ardiff import distributed
from ardiff.train.engines.base import LossModule, ResultT, blocks_of
from ardiff.train.engines.torch_engine import DTYPES, TorchEngine
from ardiff.train.muon import Muon


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from all ranks if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded(value: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a whole tensor, in the same parts as ``like``. Nothing is exchanged."""
    assert isinstance(like, DTensor)
    replicated = DTensor.from_local(value.to(like.device), like.device_mesh, [Replicate()], run_check=False)
    return replicated.redistribute(placements=like.placements)


class ShardedMuon(Muon):
    """Muon of sharded matrices: every rank orthogonalises the whole matrices and keeps its part of the updates."""

    def _stacked(self, matrices: list[Tensor]) -> Tensor:
        return torch.stack([whole(matrix) for matrix in matrices])

    def _subtract(self, parameters: list[Tensor], updates: Tensor, rate: float) -> None:
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.sub_(sharded(update, parameter), alpha=rate)


class FSDPEngine(TorchEngine):
    """Updates one model whose blocks are gathered one after the other; see :class:`ardiff.train.engines.base.Engine`.

    The gradients of a block are reduced while the backward pass goes on. With ``bf16``, ranks exchange weights in
    bfloat16 and sum gradients in float32.
    """

    muon_class = ShardedMuon

    def _distribute(self, model: nn.Module) -> None:
        dtype = None if self.precision == "fp32" else DTYPES[self.precision]
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        mesh = init_device_mesh(self.device.type, (distributed.size(),))
        blocks = blocks_of(model)
        ahead = [name for block in blocks for name in getattr(block, "computed_ahead", ())]
        for name in dict.fromkeys(ahead):
            fully_shard([block.get_submodule(name) for block in blocks], mesh=mesh, mp_policy=policy)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        # The root gathers the parameters outside of blocks for the whole loss.
        self.root = LossModule(model)
        fully_shard(self.root, mesh=mesh, mp_policy=policy)

    def compute(self, function: Callable[[], ResultT]) -> ResultT:
        result: ResultT = self.root(lambda: super(FSDPEngine, self).compute(function))
        return result

    def _average_gradients(self) -> None:
        """The backward pass has averaged them."""

    def _whole(self, tensor: Tensor) -> Tensor:
        return whole(tensor)

    def _placed(self, value: Tensor, like: Tensor) -> Tensor:
        return sharded(value, like)
