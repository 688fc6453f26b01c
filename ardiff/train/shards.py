"""The tensors of a checkpoint as safetensors shards, one file per group of tensors and rank.

Tensors are whole and float32, under the model's parameter names, so any engine on any number of ranks can read them.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ardiff import distributed
from ardiff.errors import CheckpointError

GROUPS = ("model", "ema", "optimizer")
"""Raw weights, EMA weights, optimizer state."""


Shard = dict[str, dict[str, Tensor]]
"""The tensors that a rank writes, by group and name."""


def local_shard(tensors: Iterable[tuple[str, str, Tensor]], copy: bool = False) -> Shard:
    """The tensors that this rank writes, on the CPU.

    Args:
        tensors: All tensors as (group, name, tensor), see :meth:`ardiff.train.engines.base.Engine.tensors`.
        copy: Copy tensors on the CPU too, so that training may go on before they are written.
    """
    shard: Shard = {group: {} for group in GROUPS}
    for group, name, tensor in tensors:
        if _writer(name, distributed.size()) == distributed.rank():
            shard[group][name] = tensor.detach().to("cpu", copy=copy).contiguous()
    return shard


def write_shard(folder: Path, shard: Shard) -> None:
    """Writes this rank's files into ``folder``. Raises OSError or SafetensorError."""
    folder.mkdir(parents=True, exist_ok=True)
    for group, tensors in shard.items():
        save_file(tensors, folder / f"{group}-{distributed.rank()}-of-{distributed.size()}.safetensors")


def _writer(name: str, size: int) -> int:
    """The rank that writes a parameter's tensors. A sum over the name's characters spreads them."""
    return sum(name.rpartition("/")[2].encode()) % size


class ShardReader:
    """Reads the tensors of a checkpoint folder one by one, whatever number of ranks wrote it."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError if a file is missing or unreadable."""
        self.files = {group: dict(self._files_by_name(folder, group)) for group in GROUPS}

    @staticmethod
    def _files_by_name(folder: Path, group: str) -> Iterator[tuple[str, Path]]:
        files = sorted(folder.glob(f"{group}-*-of-*.safetensors"))
        matches = [re.fullmatch(rf"{group}-(\d+)-of-(\d+)\.safetensors", file.name) for file in files]
        shards = {(int(m[1]), int(m[2])) for m in matches if m}
        sizes = {size for _, size in shards}
        if len(sizes) != 1 or len(shards) != max(sizes):
            raise CheckpointError(f"{folder} is not a complete training checkpoint: files of '{group}' are missing.")
        for file in files:
            try:
                with safe_open(file, framework="pt") as tensors:
                    yield from ((name, file) for name in tensors.keys())  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"Cannot read the checkpoint file {file}: {error}") from error

    def names(self, group: str) -> list[str]:
        """The names of all tensors of a group."""
        return list(self.files[group])

    def read(self, group: str, name: str) -> Tensor:
        """One tensor, on the CPU. Raises CheckpointError if the group has no tensor of that name."""
        if name not in self.files[group]:
            raise CheckpointError(f"The checkpoint has no '{name}' in '{group}': it is of another model.")
        with safe_open(self.files[group][name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    def read_all(self, group: str) -> dict[str, Tensor]:
        """All tensors of a group by name, on the CPU."""
        return {name: self.read(group, name) for name in self.names(group)}

    def copy_to(self, group: str, name: str, target: Tensor) -> None:
        """Copies one tensor into ``target``. Raises CheckpointError if it is missing or has another shape."""
        tensor = self.read(group, name)
        if tensor.shape != target.shape:
            raise CheckpointError(
                f"'{name}' has the shape {tuple(tensor.shape)} in the checkpoint and {tuple(target.shape)} in the "
                "model: the checkpoint is of another model."
            )
        with torch.no_grad():
            target.copy_(tensor)
