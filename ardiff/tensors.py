"""Tensors from safetensors files into modules, and to devices; the parameters that training changes."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ardiff.errors import CheckpointError

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name. Raises CheckpointError if it is missing or damaged."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Cannot read the weights {file}: {error}") from error


def fill(module: ModuleT, state: Mapping[str, Tensor], source: str) -> ModuleT:
    """Copies ``state`` into the parameters of ``module`` and returns it. Names and shapes must be equal.

    Raises:
        CheckpointError: They are not equal; names ``source`` and the first parameter that differs.
    """
    parameters = dict(module.named_parameters())
    for name in sorted(parameters.keys() | state.keys()):
        shape = tuple(state[name].shape) if name in state else "missing"
        expected = tuple(parameters[name].shape) if name in parameters else "not a parameter of the model"
        if shape != expected:
            raise CheckpointError(
                f"{source} does not fit the model: {name} is {shape} in the file, {expected} in the model."
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
    return module


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name. Only these are in checkpoints and in the EMA."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``. From a CPU to a GPU it is copied from pinned memory, while the CPU goes on."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
