"""Initial weights from an earlier stage or run."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ardiff.data import storage
from ardiff.data.buckets import assign
from ardiff.dit import DiT
from ardiff.errors import CheckpointError
from ardiff.models import AnyAutoencoderConfig
from ardiff.pretrained import CONFIG, PIPELINE, build_config, local_folder, read_autoencoder_config, read_config
from ardiff.resolution import Resolution
from ardiff.tensors import fill, read_tensors
from ardiff.train.checkpoint import DISCRIMINATOR, STATE
from ardiff.train.export import MODEL
from ardiff.train.shards import ShardReader
from ardiff.vae import ARAutoencoder, AutoencoderConfig
from ardiff.vae.blocks import interpolated_positions


def initialise_autoencoder(uri: str, model: ARAutoencoder, discriminator: nn.Module | None = None) -> None:
    """Loads the weights of an earlier AR-VAE into ``model``, and those of its discriminator, if any, into
    ``discriminator``.

    Args:
        uri: An AR-VAE folder, a pipeline folder (it contains an AR-VAE), or a training checkpoint. From a checkpoint
            come the model's EMA weights and the discriminator's raw weights. Wider latents are pruned to the model's
            width, see :func:`pruned`. Positions of frames of another shape are interpolated, see
            :func:`with_positions`.

    Raises:
        CheckpointError: ``uri`` is none of these, it is damaged, or its weights do not fit the model.
    """
    with _local(uri) as folder:
        if not (folder / STATE).exists():
            description = read_autoencoder_config(folder)
            weights, discriminator_weights = read_tensors(folder / "vae.safetensors"), None
        else:
            description = json.loads((folder / MODEL).read_text()) if (folder / MODEL).exists() else {}
            weights, discriminator_weights = ShardReader(folder).read_all("ema"), None
            if (folder / DISCRIMINATOR).is_dir():
                discriminator_weights = ShardReader(folder / DISCRIMINATOR).read_all("model")
    if isinstance(stored := description.get("vae"), dict):
        weights = with_positions(weights, build_config(AnyAutoencoderConfig, stored), model.config)
    fill(model, pruned(weights, model.config.token_dim), uri)
    if discriminator is not None and discriminator_weights is not None:
        fill(discriminator, discriminator_weights, storage.join(uri, DISCRIMINATOR))


def with_positions(
    weights: Mapping[str, Tensor], source: AutoencoderConfig, target: AutoencoderConfig
) -> dict[str, Tensor]:
    """The weights of ``source`` for the frames of ``target``, see
    :func:`~ardiff.vae.blocks.interpolated_positions`.

    Weights for the same rows and columns of patches come back unchanged, as do those of the authors' models, which have
    a position of the class token too.
    """
    result = dict(weights)
    if source.patch_grid() != target.patch_grid() and source.kind == target.kind == "standard":
        for name in ("encoder.patch_positions", "decoder.patch_positions"):
            result[name] = interpolated_positions(result[name], source.patch_grid(), target.patch_grid())
    return result


def initialise_dit(uri: str, model: DiT, shapes: Sequence[Resolution] = (), new_layers: bool = True) -> None:
    """Loads the weights of the AR-DiT in a pipeline folder, local or ``s3://``, into ``model``.

    A model with text may start from one without: its layers for text keep their new weights, whose output is zero, so
    that both models compute the same; see :func:`with_text_layers`. A model may also know other shapes of frames, see
    :func:`with_shapes`. ``new_layers=False`` allows neither.

    Args:
        uri: The folder.
        model: Its weights are replaced.
        shapes: Those that ``model`` knows, if there are several.
        new_layers: Whether ``model`` may have other layers for text and shapes.

    Raises:
        CheckpointError: ``uri`` is no pipeline, it is damaged, or its weights do not fit the model.
    """
    with local_folder(uri) as folder:
        config = read_config(folder, PIPELINE)
        weights = read_tensors(folder / "dit.safetensors")
        if new_layers:
            known = build_config(AnyAutoencoderConfig, config["vae"]).shapes
            weights = with_shapes(with_text_layers(weights, model), known, shapes)
        fill(model, weights, uri)


def with_text_layers(weights: Mapping[str, Tensor], model: DiT) -> dict[str, Tensor]:
    """The weights of an AR-DiT without text, with the new text layers of ``model``. A model without classes takes the
    null class of one with classes. Weights that have text layers, and those for a model without, come back unchanged.
    """
    result = dict(weights)
    text_layers = {n: p.detach() for n, p in model.named_parameters() if n.startswith("text_") or ".text_" in n}
    if not text_layers or result.keys() & text_layers.keys():
        return result
    classes = "class_embedding.weight"
    if classes in result and not model.config.num_classes:
        result[classes] = result[classes][-1:]
    return result | text_layers


def with_shapes(
    weights: Mapping[str, Tensor], known: Sequence[Resolution], shapes: Sequence[Resolution]
) -> dict[str, Tensor]:
    """The weights of an AR-DiT that knows frames of ``known`` shapes, for one that knows ``shapes``; none is one shape.

    Each shape starts from the embedding of the known shape that is cropped the least for it. A model of one shape has
    no embedding, which is a zero one; a model of one shape starts from the first of several. So before the first step
    a model computes for each shape what the earlier one computes for the known shape.
    """
    result, name, classes = dict(weights), "shape_embedding.weight", "class_embedding.weight"
    if classes not in result or (name not in result and len(shapes) < 2):
        return result
    stored = result.pop(name, torch.zeros_like(result[classes][:1]))  # (known shapes, C)
    if len(shapes) < 2:
        result[classes] = result[classes] + stored[0]
        return result
    heights, widths = (np.array(sides) for sides in zip(*shapes, strict=True))
    result[name] = stored[torch.from_numpy(assign(heights, widths, known))]
    return result


def pruned(weights: Mapping[str, Tensor], token_dim: int) -> dict[str, Tensor]:
    """An AR-VAE's weights with only the first ``token_dim`` latent channels, as Sec. 4.1 prunes D = 12 to 4.

    The encoder keeps its first means and log variances, and the decoder reads only those. Weights of latents that are
    not wider come back unchanged.
    """
    result = dict(weights)
    token_in, moments = "decoder.token_in.weight", ("encoder.moments.weight", "encoder.moments.bias")
    if token_in not in result or result[token_in].shape[1] <= token_dim:
        return result
    result[token_in] = result[token_in][:, :token_dim]
    for name in moments:
        if name in result:
            result[name] = torch.cat([half[:token_dim] for half in result[name].chunk(2)])
    return result


@contextmanager
def _local(uri: str) -> Iterator[Path]:
    """The local path of the folder ``uri``: itself, or a temporary copy."""
    if not any(storage.exists(storage.join(uri, file)) for file in (CONFIG, STATE)):
        raise CheckpointError(
            f"{uri} is neither a trained model nor a training checkpoint: it contains neither {CONFIG} nor {STATE}."
        )
    if not storage.is_remote(uri):
        yield Path(uri)
        return
    with tempfile.TemporaryDirectory() as folder:
        storage.download_folder(uri, Path(folder))
        yield Path(folder)
