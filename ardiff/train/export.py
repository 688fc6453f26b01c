"""Exports the model of a training checkpoint, whatever engine and number of workers wrote it.

A checkpoint contains ``model.json``, a description of its model, so that exporting needs neither deepspeed, a GPU nor
the training data.

ardiff export runs/dit/ray/checkpoint-00010000-1a2b runs/exported weights=raw
"""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ardiff.adapters import save_adapter
from ardiff.config import to_dict
from ardiff.data import storage
from ardiff.data.latents import LatentSet, LatentStatistics, vae_fingerprint
from ardiff.data.texts import UsedEncoder
from ardiff.diffusion.config import DiffusionConfig
from ardiff.dit import DiTConfig
from ardiff.dit.config import LoRAConfig
from ardiff.dit.lora import merged
from ardiff.errors import CheckpointError, ConfigError
from ardiff.models import AnyAutoencoderConfig, AnyDiTConfig, make_autoencoder, make_dit
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.pretrained import CONFIG, build_config, fingerprint_of, load_autoencoder, local_folder, save_autoencoder
from ardiff.tensors import read_tensors
from ardiff.train.checkpoint import read_state
from ardiff.train.shards import ShardReader
from ardiff.vae import AutoencoderConfig

MODEL = "model.json"
ADAPTER = "lora"
"""Subfolder of a pipeline folder: the low-rank adapter that its AR-DiT contains."""
POSITIONALS = ("checkpoint", "output")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Exports the model of a training checkpoint."""

    checkpoint: str = ""
    """Folder of a checkpoint, local or ``s3://``, in ``ray`` or ``best`` of a run's folder."""
    output: str = ""
    """Folder to write: a pipeline for an AR-DiT, an AR-VAE folder for an AR-VAE. Of a low-rank adapter the pipeline
    contains the merged model, and its subfolder ``lora`` the adapter."""
    weights: Literal["ema", "raw"] = "ema"
    """``ema``: the exponential moving average of the weights. ``raw``: the weights of the last update."""
    base_pipeline: str | None = None
    """For a low-rank adapter: folder of the pipeline on which it was trained. Default: where that one was."""
    vae: str | None = None
    """For an AR-DiT: folder of the AR-VAE to put into the pipeline. Default: the one that encoded the training latents,
    which must still be where it was."""


def run(config: ExportConfig) -> None:
    """Writes the model folder. Raises ArdiffError."""
    if not config.checkpoint or not config.output:
        raise ConfigError("A checkpoint and an output folder are required: ardiff export CHECKPOINT OUTPUT.")
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
                f"{config.checkpoint} cannot be exported: {MODEL}, the description of its model, is missing or damaged."
            ) from error
        if config.vae is not None:
            if description["kind"] != "ar-dit":
                raise ConfigError("vae= applies to checkpoints of an AR-DiT, but this checkpoint is of an AR-VAE.")
            description |= {"vae": config.vae, "vae_fingerprint": ""}
        if config.base_pipeline is not None:
            if "lora" not in description:
                raise ConfigError(
                    "base_pipeline= applies to checkpoints of a low-rank adapter, but this one is of a whole model."
                )
            description |= {"base": config.base_pipeline, "base_fingerprint": ""}
        weights = ShardReader(folder).read_all("ema" if config.weights == "ema" else "model")
        write_trained(description, weights, config.output)
    print(f"{config.output}: {description['kind']} of step {state.step}, {config.weights} weights")


def describe_autoencoder(config: AutoencoderConfig) -> dict[str, Any]:
    """The description of an AR-VAE for :func:`write_trained`."""
    return {"kind": "ar-vae", "vae": to_dict(config)}


def describe_dit(
    config: DiTConfig,
    diffusion: DiffusionConfig,
    latents: LatentSet,
    class_names: list[str],
    text: UsedEncoder | None = None,
    lora: LoRAConfig | None = None,
    base: str = "",
) -> dict[str, Any]:
    """The description of an AR-DiT trained on ``latents`` and ``text``, for :func:`write_trained`; with ``lora``, of an
    adapter for the AR-DiT in the pipeline ``base``."""
    adapter = {}
    if lora is not None and lora.rank:
        adapter = {"lora": to_dict(lora), "base": storage.absolute(base), "base_fingerprint": fingerprint_of(base)}
    return {
        "kind": "ar-dit",
        "dit": to_dict(config),
        "diffusion": to_dict(diffusion),
        "latent_statistics": asdict(latents.statistics),
        "class_names": class_names,
        "vae": storage.absolute(latents.vae),
        "vae_fingerprint": latents.vae_fingerprint,
        **({} if text is None else {"text_encoder": to_dict(text)}),
        **adapter,
    }


def write_trained(description: dict[str, Any], weights: dict[str, Tensor], output: str) -> None:
    """Writes the folder of a trained model: an AR-VAE, or a pipeline of an AR-DiT and its AR-VAE.

    Of an adapter, the pipeline holds the AR-DiT merged with it, and the subfolder :data:`ADAPTER` the adapter.

    Raises:
        CheckpointError: The weights do not fit the model, or its AR-VAE or the adapter's base is missing or was
            replaced by another.
    """
    if description["kind"] == "ar-vae":
        vae = make_autoencoder(build_config(AnyAutoencoderConfig, description["vae"]))
        save_autoencoder(output, _fill(vae, weights))
        return
    dit = make_dit(build_config(AnyDiTConfig, description["dit"]))
    diffusion = build_config(DiffusionConfig, description["diffusion"])
    statistics = LatentStatistics(**description["latent_statistics"])
    uri, expected = description["vae"], description.get("vae_fingerprint")
    if expected and expected != vae_fingerprint(uri):
        raise CheckpointError(
            f"{uri} is no longer the AR-VAE {expected}, which encoded the AR-DiT's training latents: give the "
            "folder of that AR-VAE with `ardiff export CHECKPOINT OUTPUT vae=FOLDER`."
        )
    vae = load_autoencoder(uri)
    if "lora" in description:
        config = build_config(LoRAConfig, description["lora"])
        adapter, weights = weights, _merge(description, weights, config)
        save_adapter(storage.join(output, ADAPTER), adapter, config, description["base"])
    text = build_config(UsedEncoder, description["text_encoder"]) if "text_encoder" in description else None
    names = description["class_names"]
    pipeline = ARDiffusionPipeline(vae, _fill(dit, weights), diffusion, statistics, names, text_source=text)
    pipeline.save_pretrained(output)


def _merge(description: dict[str, Any], weights: dict[str, Tensor], config: LoRAConfig) -> dict[str, Tensor]:
    """The weights of the base with an adapter's updates. Raises CheckpointError."""
    base, expected = description["base"], description["base_fingerprint"]
    is_there = storage.exists(storage.join(base, CONFIG))
    if not is_there or (expected and expected != fingerprint_of(base)):
        raise CheckpointError(
            f"{base} {'is no longer' if is_there else 'does not hold'} the pipeline on which the adapter was trained: "
            "give the folder of that one with `ardiff export CHECKPOINT OUTPUT base_pipeline=FOLDER`."
        )
    with local_folder(base) as folder:
        whole = read_tensors(folder / "dit.safetensors")
    return whole | merged(whole, weights, config.scale)


def _fill(model: Any, weights: dict[str, Tensor]) -> Any:
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"The checkpoint's weights do not fit the model it describes: {error}") from error
    return model.eval()
