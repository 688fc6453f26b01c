"""Trained models from training: a finished run's, or any checkpoint's, whatever engine and number of workers wrote it.

A checkpoint holds ``model.json``, a description of what its weights are, so that a pipeline can be made of it on a
machine without deepspeed, GPU or the training data.

ardiff export runs/dit/ray/checkpoint-00010000-1a2b runs/exported weights=raw
"""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ardiff.config import to_dict
from ardiff.data import storage
from ardiff.data.latents import LatentSet, LatentStatistics, vae_fingerprint
from ardiff.diffusion.config import DiffusionConfig
from ardiff.dit import DiT, DiTConfig
from ardiff.errors import CheckpointError, ConfigError
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.pretrained import build_config, load_autoencoder, save_autoencoder
from ardiff.train.checkpoint import Shards, read_state
from ardiff.vae import ARAutoencoder, AutoencoderConfig

MODEL = "model.json"
POSITIONALS = ("checkpoint", "output")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Makes a usable model of a training checkpoint."""

    checkpoint: str = ""
    """Folder of a checkpoint, local or ``s3://``: one of those below ``ray`` or ``best`` in a run's folder."""
    output: str = ""
    """Folder to write: a pipeline for an AR-DiT, an AR-VAE folder for an AR-VAE."""
    weights: Literal["ema", "raw"] = "ema"
    """``ema``: the average of the weights. ``raw``: the weights themselves."""
    vae: str | None = None
    """For an AR-DiT, the AR-VAE to put beside it; without it, the one that made the latents it was trained on,
    which must be in its place."""


def run(config: ExportConfig) -> None:
    """Writes the model. Raises ArdiffError."""
    if not config.checkpoint or not config.output:
        raise ConfigError("Give a checkpoint and an output folder: ardiff export CHECKPOINT OUT.")
    with tempfile.TemporaryDirectory() as copy:
        folder = Path(config.checkpoint)
        if storage.is_remote(config.checkpoint):
            folder = Path(copy)
            storage.download_folder(config.checkpoint, folder)
        state = read_state(folder)
        try:
            description = json.loads((folder / MODEL).read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{config.checkpoint} does not say what model it holds: {MODEL} is missing."
            ) from error
        if config.vae is not None:
            if description["kind"] != "ar-dit":
                raise ConfigError("vae is for checkpoints of an AR-DiT; this one is of an AR-VAE.")
            description |= {"vae": config.vae, "vae_fingerprint": ""}
        part = "ema" if config.weights == "ema" else "model"
        shards = Shards(folder)
        weights = {name: shards.read(part, name) for name in shards.names(part)}
        write_trained(description, weights, config.output)
    print(f"{config.output}: {description['kind']} of step {state.step}, {config.weights} weights")


def describe_autoencoder(config: AutoencoderConfig) -> dict[str, Any]:
    """What :func:`write_trained` needs to know of an AR-VAE."""
    return {"kind": "ar-vae", "vae": to_dict(config)}


def describe_dit(
    config: DiTConfig, diffusion: DiffusionConfig, latents: LatentSet, class_names: list[str]
) -> dict[str, Any]:
    """What :func:`write_trained` needs to know of an AR-DiT; ``latents`` are what it is trained on."""
    return {
        "kind": "ar-dit",
        "dit": to_dict(config),
        "diffusion": to_dict(diffusion),
        "latent_statistics": asdict(latents.statistics),
        "class_names": class_names,
        "vae": storage.absolute(latents.vae),
        "vae_fingerprint": latents.vae_fingerprint,
    }


def write_trained(description: dict[str, Any], weights: dict[str, Tensor], output: str) -> None:
    """Writes the folder of a trained model: an AR-VAE, or a pipeline of an AR-DiT and its AR-VAE.

    Raises:
        CheckpointError: The weights are not the model's, or in the place of its AR-VAE is none or another.
    """
    if description["kind"] == "ar-vae":
        vae = ARAutoencoder(build_config(AutoencoderConfig, description["vae"]))
        save_autoencoder(output, _fill(vae, weights))
        return
    dit = DiT(build_config(DiTConfig, description["dit"]))
    diffusion = build_config(DiffusionConfig, description["diffusion"])
    statistics = LatentStatistics(**description["latent_statistics"])
    place, known = description["vae"], description.get("vae_fingerprint")
    if known and known != vae_fingerprint(place):
        raise CheckpointError(
            f"{place} is no longer the AR-VAE {known}, on whose latents the AR-DiT was trained: make the pipeline with "
            "`ardiff export CHECKPOINT OUT vae=PLACE`, PLACE being where that AR-VAE lies."
        )
    vae = load_autoencoder(place)
    pipeline = ARDiffusionPipeline(vae, _fill(dit, weights), diffusion, statistics, description["class_names"])
    pipeline.save_pretrained(output)


def _fill(model: Any, weights: dict[str, Tensor]) -> Any:
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"The checkpoint's weights do not fit the model it describes: {error}") from error
    return model.eval()
