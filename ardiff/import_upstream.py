"""``ardiff import-upstream``: the authors' checkpoints as model folders.

ardiff import-upstream --dit ardiff_sky.bin --vae vae_sky.safetensors --out runs/upstream/sky
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from torch import Tensor

from ardiff.config import to_dict
from ardiff.data import storage
from ardiff.data.latents import LatentStatistics
from ardiff.diffusion.config import DiffusionConfig
from ardiff.dit import DiT, DiTConfig
from ardiff.errors import CheckpointError, ConfigError
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.pretrained import save_autoencoder
from ardiff.upstream.autoencoder import UpstreamAutoencoder
from ardiff.upstream.checkpoints import TABLES, load_dit, load_vae, vae_from_titok
from ardiff.upstream.files import read_checkpoint
from ardiff.vae import ARAutoencoder

DIFFUSION = "diffusion_model."
NETWORK = f"{DIFFUSION}model."
VAE = "vae."
SCHEDULE = (
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "betas",
    "log_one_minus_alphas_cumprod",
    "logvar",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "posterior_variance",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
)
"""Buffers of the noise schedule, which the authors' trainer stores beside the network. None of them is a weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportConfig:
    """Converts upstream checkpoints to a pipeline folder, or an AR-VAE alone to an AR-VAE folder."""

    dit: str = ""
    """Checkpoint of the AR-DiT: .safetensors, or .bin or .pt, from which only tensors are read; local or s3://."""
    vae: str = ""
    """Checkpoint of the AR-VAE, with or without temporal attention in its decoder. Default: the one in the AR-DiT's
    file."""
    out: str = ""
    """Folder to write, local or s3://: a pipeline if an AR-DiT is given, else an AR-VAE folder."""
    vae_from_titok: str = ""
    """Instead of both: checkpoint of the public TiTok-L-32 tokenizer, to start AR-VAE training from."""
    strict_causal: bool = False
    """Let condition tokens of the AR-DiT see only one another, to fine-tune a causal model. Until then its outputs
    differ from those of the upstream model."""
    image_size: int = 256
    """Height and width of the AR-VAE's frames in pixels."""
    num_frames: int = 16
    """Frames of a clip, in the AR-DiT and in the AR-VAE's temporal decoder."""
    token_dim: int = 4
    """Channels of a latent token to keep of TiTok's 12."""
    dit_heads: int = 16
    """Attention heads of the AR-DiT, which the weights do not tell."""
    vae_heads: int = 16
    """Attention heads of the AR-VAE, which the weights do not tell."""

    def __post_init__(self) -> None:
        if min(self.image_size, self.num_frames, self.token_dim, self.dit_heads, self.vae_heads) < 1:
            raise ValueError("image_size, num_frames, token_dim, dit_heads and vae_heads must be at least 1")


def run(config: ImportConfig) -> None:
    """Imports the given checkpoints. Raises ArdiffError; then nothing is written."""
    if not config.out or not (config.dit or config.vae or config.vae_from_titok):
        raise ConfigError("Give --dit FILE and --vae FILE, or --vae or --vae-from-titok alone, and --out DIR.")
    if config.vae_from_titok and (config.dit or config.vae):
        raise ConfigError("--vae-from-titok makes an AR-VAE of its own: leave --dit and --vae out.")
    if config.strict_causal and not config.dit:
        raise ConfigError("--strict-causal applies to the AR-DiT: give --dit too.")
    if config.dit:
        _import_pipeline(config)
    else:
        _import_vae(config)


def _import_pipeline(config: ImportConfig) -> None:
    network, included_vae = _split(_read(config.dit, "AR-DiT"), config.dit)
    if not config.vae and not included_vae:
        raise ConfigError(f"{config.dit} holds no AR-VAE: give its checkpoint with --vae.")
    if config.vae and included_vae:
        print(f"{config.dit} holds an AR-VAE too, which is not used: --vae {config.vae} is")
    dit = load_dit(
        network,
        num_heads=config.dit_heads,
        num_frames=config.num_frames,
        condition_attention="self" if config.strict_causal else "all",
        source=config.dit,
    )
    if not dit.config.condition_tokens:
        raise CheckpointError(f"{config.dit} has no condition tokens: {' or '.join(TABLES)} is missing.")
    vae = _load_vae(config, _read(config.vae, "AR-VAE") if config.vae else included_vae, config.vae or config.dit)
    _print_sizes(dit)
    _print_sizes(vae)
    # The network was trained on latents of length 1: there is nothing to normalise.
    statistics = LatentStatistics.neutral(dit.config.num_tokens, dit.config.token_dim)
    ARDiffusionPipeline(vae, dit, DiffusionConfig(), statistics).save_pretrained(config.out)
    start = _write_start(config, "train_dit.yaml", {"dit": to_dict(dit.config)})
    mode = "" if config.strict_causal else " mode=full"
    print(f"{config.out}: a pipeline; sample it with `ardiff generate pipeline={config.out}{mode}`")
    print(f"fine-tune it with `ardiff train-dit --config YOURS --config {start}`")
    if config.strict_causal:
        print(
            "Warning: with --strict-causal, condition tokens no longer see the frames, as they did in training. "
            "Outputs differ from the upstream model's until the pipeline is fine-tuned."
        )


def _import_vae(config: ImportConfig) -> None:
    if config.vae_from_titok:
        vae = vae_from_titok(
            _read(config.vae_from_titok, "TiTok tokenizer"),
            num_heads=config.vae_heads,
            image_size=config.image_size,
            num_frames=config.num_frames,
            token_dim=config.token_dim,
            source=config.vae_from_titok,
        )
    else:
        vae = _load_vae(config, _read(config.vae, "AR-VAE"), config.vae)
    _print_sizes(vae)
    save_autoencoder(config.out, vae)
    start = _write_start(config, "train_vae.yaml", {"vae": to_dict(vae.config)})
    print(f"{config.out}: an AR-VAE; continue its training with `ardiff train-vae --config YOURS --config {start}`")


def _load_vae(config: ImportConfig, state: Mapping[str, Tensor], source: str) -> UpstreamAutoencoder:
    return load_vae(
        state,
        num_heads=config.vae_heads,
        image_size=config.image_size,
        num_frames=config.num_frames,
        source=source,
    )


def _read(uri: str, what: str) -> dict[str, Tensor]:
    print(f"reading the {what} {uri}")
    return read_checkpoint(uri)


def _write_start(config: ImportConfig, name: str, model: dict[str, Any]) -> str:
    """Writes the keys with which a training job continues from the imported model; returns the file's URI."""
    uri, keys = storage.join(config.out, name), {"init_from": storage.absolute(config.out), **model}
    storage.write_bytes(uri, yaml.safe_dump(keys, sort_keys=False, width=110).encode())
    return uri


def _split(state: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint of the authors' trainer as network with condition tokens, and AR-VAE (empty if there is none).

    Raises:
        CheckpointError: The weights were trained with another noise schedule, or are unknown.
    """
    if not any(name.startswith(NETWORK) for name in state):
        return dict(state), {}
    network, vae = {}, {}
    for name, tensor in state.items():
        if name in TABLES:
            network[name] = tensor
        elif name.startswith(NETWORK):
            network[name.removeprefix(NETWORK)] = tensor
        elif name.startswith(VAE):
            vae[name.removeprefix(VAE)] = tensor
        elif name.removeprefix(DIFFUSION) not in SCHEDULE or not name.startswith(DIFFUSION):
            raise CheckpointError(f"{source} is not an upstream checkpoint of this kind: {name} is unknown.")
    stored, expected = state.get(f"{DIFFUSION}alphas_cumprod"), DiffusionConfig().alphas_cumprod()
    if stored is not None and (
        stored.shape != expected.shape or not torch.allclose(stored.double(), expected, atol=1e-2)
    ):
        raise CheckpointError(f"{source} was trained with another noise schedule than the upstream models.")
    return network, vae


def _print_sizes(model: DiT | ARAutoencoder) -> None:
    config, count = model.config, sum(p.numel() for p in model.parameters())
    if isinstance(config, DiTConfig):
        name, classes = "AR-DiT", f"{config.num_classes} classes" if config.num_classes else "no classes"
        details = f"{config.num_frames} frames, {classes}, {config.condition_tokens} condition tokens"
    else:
        temporal = "without temporal attention" if config.temporal == "none" else "temporal attention in clips"
        name, details = "AR-VAE", f"{config.resolution.width} x {config.resolution.height} pixels, {temporal}"
    print(f"{name}: {count:,} parameters, latents {config.num_tokens} x {config.token_dim}, {details}")
