"""Trained models as folders: ``config.json`` and safetensors, local or on S3; nothing is unpickled.

An AR-VAE folder holds ``config.json`` and ``vae.safetensors``; a pipeline folder (see :mod:`ardiff.pipeline`) holds
``config.json``, ``vae.safetensors`` and ``dit.safetensors``.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ardiff.config import build, to_dict
from ardiff.data import storage
from ardiff.errors import ArdiffError, CheckpointError
from ardiff.vae import ARAutoencoder, AutoencoderConfig

CONFIG = "config.json"
FORMAT = 1
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@contextlib.contextmanager
def local_folder(uri: str) -> Iterator[Path]:
    """The folder ``uri`` as a local one: itself, or a temporary copy. Raises CheckpointError if it has no config."""
    if not storage.exists(storage.join(uri, CONFIG)):
        raise CheckpointError(f"There is no trained model in {uri}: it should hold {CONFIG}.")
    if not storage.is_remote(uri):
        yield Path(uri)
        return
    with tempfile.TemporaryDirectory() as folder:
        storage.download_folder(uri, Path(folder))
        yield Path(folder)


def write_model(uri: str, config: dict[str, Any], modules: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Writes a model folder: one safetensors file per module, then ``config.json``, whose presence makes it whole."""
    with tempfile.TemporaryDirectory() as folder:
        for name, state in modules.items():
            tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
            save_file(tensors, Path(folder) / f"{name}.safetensors")
        storage.upload_folder(Path(folder), uri)
    storage.write_bytes(storage.join(uri, CONFIG), json.dumps({"format": FORMAT, **config}, indent=1).encode())


def read_config(folder: str | Path, kind: str) -> dict[str, Any]:
    """The content of ``config.json``. Raises CheckpointError if it is of another kind or format."""
    file = storage.join(str(folder), CONFIG)
    try:
        config: dict[str, Any] = json.loads(storage.read_bytes(file))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds no configuration.")
    if config.get("kind") != kind or config.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} holds a {config.get('kind', 'model of unknown kind')} of format {config.get('format')}, "
            f"not a {kind} of format {FORMAT}."
        )
    return config


def load_weights(module: ModuleT, file: Path) -> ModuleT:
    """Fills ``module`` from a safetensors file and puts it in evaluation mode.

    Raises:
        CheckpointError: The file is missing or damaged, or its tensors are not the module's; names the first that
            differs.
    """
    return fill(module, read_tensors(file), str(file)).eval()


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name. Raises CheckpointError if it is missing or damaged."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Cannot read the weights {file}: {error}") from error


def fill(module: ModuleT, state: Mapping[str, Tensor], source: str) -> ModuleT:
    """Copies ``state`` over the parameters of ``module``, which must be the same by name and shape, and returns it.

    Raises:
        CheckpointError: They are not; names ``source`` and the first that differs.
    """
    expected = dict(module.named_parameters())
    for name in sorted(expected.keys() | state.keys()):
        have = tuple(state[name].shape) if name in state else "missing"
        want = tuple(expected[name].shape) if name in expected else "not a parameter of the model"
        if have != want:
            raise CheckpointError(
                f"{source} does not fit the model: {name} is {have} in the file, {want} in the model."
            )
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(state[name])
    return module


def save_autoencoder(uri: str, model: ARAutoencoder, weights: Mapping[str, Tensor] | None = None) -> None:
    """Writes an AR-VAE folder with the model's own weights or the given ones."""
    state: Mapping[str, Tensor] = dict(model.named_parameters()) if weights is None else weights
    write_model(uri, {"kind": "ar-vae", "vae": to_dict(model.config)}, {"vae": state})


def load_autoencoder(uri: str) -> ARAutoencoder:
    """Reads an AR-VAE folder. Raises CheckpointError."""
    with local_folder(uri) as folder:
        config = read_config(folder, "ar-vae")
        return load_weights(ARAutoencoder(build_config(AutoencoderConfig, config["vae"])), folder / "vae.safetensors")


def build_config(cls: type[Any], tree: dict[str, Any]) -> Any:
    """A stored configuration as its dataclass. Raises CheckpointError if this version does not know it."""
    try:
        return build(cls, tree)
    except ArdiffError as error:
        raise CheckpointError(f"The model was written by another version of ardiff: {error}") from error
