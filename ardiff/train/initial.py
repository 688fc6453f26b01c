"""Where a stage begins: the weights that an earlier stage ended with."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ardiff.data import storage
from ardiff.dit import DiT
from ardiff.errors import CheckpointError
from ardiff.pretrained import CONFIG, local_folder, read_config
from ardiff.tensors import fill, read_tensors
from ardiff.train.checkpoint import CRITIC, STATE, Shards
from ardiff.vae import ARAutoencoder


def initialise_autoencoder(uri: str, model: ARAutoencoder, critic: nn.Module | None = None) -> None:
    """Gives ``model`` the weights of an earlier AR-VAE, and ``critic`` those of its discriminator if there are any.

    Args:
        uri: An AR-VAE folder, a pipeline folder (it holds an AR-VAE), or a training checkpoint: of that the averaged
            weights, and the raw ones of its discriminator. A wider latent is pruned to the model's, see
            :func:`pruned`.

    Raises:
        CheckpointError: There is none of these, it is damaged, or its weights do not fit the model.
    """
    with _local(uri) as folder:
        if not (folder / STATE).exists():
            kind = "ar-diffusion-pipeline" if (folder / "dit.safetensors").exists() else "ar-vae"
            read_config(folder, kind)
            weights, rival = read_tensors(folder / "vae.safetensors"), None
        else:
            weights = _tensors(folder, "ema")
            rival = _tensors(folder / CRITIC, "model") if (folder / CRITIC).is_dir() else None
    fill(model, pruned(weights, model.config.token_dim), uri)
    if critic is not None and rival is not None:
        fill(critic, rival, storage.join(uri, CRITIC))


def initialise_dit(uri: str, model: DiT) -> None:
    """Gives ``model`` the weights of the AR-DiT in a pipeline folder, local or ``s3://``.

    Raises:
        CheckpointError: There is no pipeline, it is damaged, or its weights do not fit the model.
    """
    with local_folder(uri) as folder:
        read_config(folder, "ar-diffusion-pipeline")
        fill(model, read_tensors(folder / "dit.safetensors"), uri)


def pruned(weights: Mapping[str, Tensor], token_dim: int) -> dict[str, Tensor]:
    """An AR-VAE's weights with the later channels of its latents dropped, as Sec. 4.1 does from D = 12 to 4.

    The first ``token_dim`` means and log variances of the encoder stay as they are, and the decoder reads those alone.
    Weights of as wide or narrower latents come back unchanged.
    """
    kept = dict(weights)
    reader, moments = "decoder.token_in.weight", ("encoder.moments.weight", "encoder.moments.bias")
    if reader not in kept or kept[reader].shape[1] <= token_dim:
        return kept
    kept[reader] = kept[reader][:, :token_dim]
    for name in moments:
        if name in kept:
            kept[name] = torch.cat([half[:token_dim] for half in kept[name].chunk(2)])
    return kept


@contextmanager
def _local(uri: str) -> Iterator[Path]:
    """The folder ``uri`` as a local one: itself, or a temporary copy."""
    if not any(storage.exists(storage.join(uri, mark)) for mark in (CONFIG, STATE)):
        raise CheckpointError(
            f"There is neither a trained model nor a training checkpoint in {uri}: it should hold {CONFIG} or {STATE}."
        )
    if not storage.is_remote(uri):
        yield Path(uri)
        return
    with tempfile.TemporaryDirectory() as folder:
        storage.download_folder(uri, Path(folder))
        yield Path(folder)


def _tensors(folder: Path, part: str) -> dict[str, Tensor]:
    shards = Shards(folder)
    return {name: shards.read(part, name) for name in shards.names(part)}
