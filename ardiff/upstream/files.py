"""Weights from untrusted files: safetensors, or torch's own format without unpickling anything but tensors."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ardiff.data import storage
from ardiff.errors import CheckpointError
from ardiff.tensors import read_tensors

WRAPPERS = ("state_dict", "model", "module")
"""Keys under which trainers store a model's weights."""


def read_checkpoint(uri: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name: ``.safetensors``, or ``.bin``, ``.pt``, ``.pth``; local or ``s3://``.

    A wrapper such as ``state_dict`` and the prefix ``module.`` of distributed training are removed.

    Raises:
        CheckpointError: The file is missing or damaged, or holds anything but tensors. Nothing in it is executed.
    """
    if not storage.exists(uri):
        raise CheckpointError(f"There is no checkpoint {uri}.")
    if not storage.is_remote(uri):
        return _named_tensors(_load(Path(uri), uri), uri)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / Path(uri).name
        copy.write_bytes(storage.read_bytes(uri))
        # Cloned, because the mapped file is deleted on return.
        return {name: tensor.clone() for name, tensor in _named_tensors(_load(copy, uri), uri).items()}


def _load(file: Path, uri: str) -> Any:
    if file.suffix == ".safetensors":
        return read_tensors(file)
    if not file.is_file():
        raise CheckpointError(f"{uri} is a folder: give the file with the weights in it.")
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=_is_archive(file))
    except Exception as error:  # a damaged or hostile file can make the reader fail in any way
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "weights_only" in str(error).lower() or "weights only" in str(error).lower():
            raise CheckpointError(
                f"{uri} holds more than tensors. Unpickling it could execute code, so it is refused. "
                "If you trust it, save its state_dict as safetensors."
            ) from error
        raise CheckpointError(f"Cannot read the weights {uri}, damaged or of another format: {reason}") from error


def _is_archive(file: Path) -> bool:
    """Whether torch wrote the file as a zip archive, which can be mapped into memory; before 1.6 it wrote pickles."""
    with file.open("rb") as opened:
        return opened.read(4) == b"PK\x03\x04"


def _named_tensors(content: Any, uri: str) -> dict[str, Tensor]:
    for _ in WRAPPERS:  # bounded: a wrapper can hold itself
        wrapper = next((key for key in WRAPPERS if isinstance(content, Mapping) and key in content), None)
        if wrapper is None or not isinstance(content[wrapper], Mapping):
            break
        content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{uri} holds no weights by name.")
    wrong = [str(k) for k, v in content.items() if not isinstance(k, str) or not isinstance(v, Tensor)]
    if wrong:
        raise CheckpointError(f"{uri} holds more than tensors by name: {', '.join(wrong[:5])}.")
    prefix = "module." if all(name.startswith("module.") for name in content) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in content.items()}
