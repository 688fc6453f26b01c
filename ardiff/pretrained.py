"""Trained models as folders: ``config.json`` and safetensors, local or on S3; nothing is unpickled.

An AR-VAE folder holds ``config.json`` and ``vae.safetensors``; a pipeline folder (see :mod:`ardiff.pipeline`) holds
``config.json``, ``vae.safetensors`` and ``dit.safetensors``.
"""

import contextlib
import hashlib
import io
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ardiff import hub
from ardiff.config import build, to_dict
from ardiff.data import storage
from ardiff.errors import ArdiffError, CheckpointError
from ardiff.models import AnyAutoencoderConfig, make_autoencoder
from ardiff.tensors import ModuleT, fill, read_tensors
from ardiff.vae import ARAutoencoder

CONFIG = "config.json"
PIPELINE = "ar-diffusion-pipeline"
"""Kind of a pipeline folder."""
FORMAT = 1
PIPELINE_FILES = (CONFIG, "vae.safetensors", "dit.safetensors")
CHUNK_BYTES = 8 * 2**20


def find_model(uri: str, revision: str | None = None, local_files_only: bool = True) -> str:
    """The folder of a model: ``uri`` itself, or a hub repository in the cache or, if allowed, downloaded.

    Raises:
        CheckpointError: It is the name of a hub repository, but neither a folder nor in the cache.
    """
    if not hub.is_repo_id(uri) or storage.exists(storage.join(uri, CONFIG)):
        return uri
    if (cached := hub.find(uri, revision)) is not None:
        return str(cached)
    if not local_files_only:
        return str(hub.download(uri, revision))
    raise CheckpointError(
        f"There is no trained model in {uri}: it should hold {CONFIG}. Nor does the hub's cache hold a repository of "
        "that name: download it with local_files_only=False."
    )


@contextlib.contextmanager
def local_folder(uri: str) -> Iterator[Path]:
    """The folder ``uri`` as a local path: itself, or a temporary copy. Raises CheckpointError if it has no config."""
    if not storage.exists(storage.join(uri, CONFIG)):
        raise CheckpointError(f"There is no trained model in {uri}: it should hold {CONFIG}.")
    if not storage.is_remote(uri):
        yield Path(uri)
        return
    with tempfile.TemporaryDirectory() as folder:
        storage.download_folder(uri, Path(folder))
        yield Path(folder)


def fingerprint_of(uri: str) -> str:
    """64 hex digits of a hash over the files of a pipeline, read in chunks. Raises StorageError."""
    digest = hashlib.sha256()
    for name in PIPELINE_FILES:
        file = storage.join(uri, name)
        reader = io.BufferedReader(storage.RangeReader(file, storage.size(file)), CHUNK_BYTES)
        while chunk := reader.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_model(uri: str, config: dict[str, Any], modules: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Writes a model folder: one safetensors file per module, and ``config.json`` last, which marks it complete."""
    with tempfile.TemporaryDirectory() as folder:
        for name, state in modules.items():
            tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
            save_file(tensors, Path(folder) / f"{name}.safetensors")
        storage.upload_folder(Path(folder), uri)
    storage.write_bytes(storage.join(uri, CONFIG), json.dumps({"format": FORMAT, **config}, indent=1).encode())


def read_config(folder: str | Path, kind: str) -> dict[str, Any]:
    """The content of ``config.json``. Raises CheckpointError if the folder is of another kind or format."""
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


def build_config(hint: Any, tree: dict[str, Any]) -> Any:
    """A stored configuration as its dataclass. Raises CheckpointError if it has keys that this version lacks.

    ``hint`` is the dataclass, or a union of them such as :data:`ardiff.models.AnyDiTConfig`.
    """
    try:
        return build(hint, tree)
    except ArdiffError as error:
        raise CheckpointError(f"The model was written by another version of ardiff: {error}") from error


def load_weights(module: ModuleT, file: Path) -> ModuleT:
    """Fills ``module`` from a safetensors file and puts it in evaluation mode.

    Raises:
        CheckpointError: The file is missing or damaged, or its tensors are not the module's; names the first that
            differs.
    """
    return fill(module, read_tensors(file), str(file)).eval()


def save_autoencoder(uri: str, model: ARAutoencoder, weights: Mapping[str, Tensor] | None = None) -> None:
    """Writes an AR-VAE folder with the given weights, by default the model's own."""
    state: Mapping[str, Tensor] = dict(model.named_parameters()) if weights is None else weights
    write_model(uri, {"kind": "ar-vae", "vae": to_dict(model.config)}, {"vae": state})


def load_autoencoder(uri: str) -> ARAutoencoder:
    """Reads the AR-VAE of an AR-VAE folder or of a pipeline folder, in evaluation mode. Raises CheckpointError."""
    with local_folder(uri) as folder:
        config = build_config(AnyAutoencoderConfig, read_autoencoder_config(folder)["vae"])
        return load_weights(make_autoencoder(config), folder / "vae.safetensors")


def read_autoencoder_config(folder: Path) -> dict[str, Any]:
    """The content of ``config.json`` of an AR-VAE folder or a pipeline folder, which holds an AR-VAE."""
    return read_config(folder, PIPELINE if (folder / "dit.safetensors").exists() else "ar-vae")
