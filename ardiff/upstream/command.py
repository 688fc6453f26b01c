"""``ardiff import-upstream``: the authors' checkpoints as folders that everything here works with.

ardiff import-upstream --dit ardiff_sky.bin --vae vae_sky.safetensors --out runs/released/sky
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ardiff.config import to_yaml
from ardiff.data import storage
from ardiff.data.latents import LatentStatistics
from ardiff.diffusion.config import DiffusionConfig
from ardiff.dit import DiT, DiTConfig
from ardiff.errors import CheckpointError, ConfigError
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.pretrained import save_autoencoder
from ardiff.upstream.files import read_checkpoint
from ardiff.upstream.models import TABLES, load_dit, load_vae, vae_from_titok
from ardiff.vae import ARAutoencoder, AutoencoderConfig

NETWORK = "diffusion_model.model."
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
"""Buffers beside the network that say what the noise schedule was; none of them is a weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportConfig:
    """Turns released checkpoints into a pipeline folder, or an AR-VAE alone into an AR-VAE folder."""

    dit: str = ""
    """Checkpoint of the AR-DiT: .safetensors, or .bin or .pt, of which nothing but tensors is read; local or s3://."""
    vae: str = ""
    """Checkpoint of the AR-VAE, with or without temporal attention in its decoder. Left out, the AR-DiT's file may hold
    it too."""
    out: str = ""
    """Folder to write, local or s3://: a pipeline if there is an AR-DiT, else an AR-VAE folder."""
    vae_from_titok: str = ""
    """Instead of both: checkpoint of the public TiTok-L-32 tokenizer, from which AR-VAE training is to start."""
    strict_causal: bool = False
    """Run the AR-DiT with condition tokens that see only themselves, as a start of fine-tuning. Its outputs then differ
    from those of the released model."""
    image_size: int = 256
    """Height and width of the AR-VAE's frames in pixels."""
    num_frames: int = 16
    """Frames of a clip, in the AR-DiT and in the AR-VAE's temporal decoder."""
    token_dim: int = 4
    """Channels of a latent token that are kept of TiTok's 12."""
    dit_heads: int = 16
    """Attention heads of the AR-DiT; the weights do not tell."""
    vae_heads: int = 16
    """Attention heads of the AR-VAE; the weights do not tell."""

    def __post_init__(self) -> None:
        if min(self.image_size, self.num_frames, self.token_dim, self.dit_heads, self.vae_heads) < 1:
            raise ValueError("image_size, num_frames, token_dim, dit_heads and vae_heads must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderStart:
    """What ``ardiff train-vae`` needs to go on from an imported AR-VAE, as one of its configuration files."""

    init_from: str
    vae: AutoencoderConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class DiTStart:
    """What ``ardiff train-dit`` needs to go on from an imported AR-DiT, as one of its configuration files."""

    init_from: str
    dit: DiTConfig


def run(config: ImportConfig) -> None:
    """Imports what is given. Raises ArdiffError; then nothing is written."""
    if not config.out or not (config.dit or config.vae or config.vae_from_titok):
        raise ConfigError("Give --dit FILE and --vae FILE, or --vae or --vae-from-titok alone, and --out DIR.")
    if config.vae_from_titok and (config.dit or config.vae):
        raise ConfigError("--vae-from-titok starts an AR-VAE of its own: leave --dit and --vae out.")
    if config.strict_causal and not config.dit:
        raise ConfigError("--strict-causal is about the AR-DiT: give --dit too.")
    if not config.dit:
        _import_vae(config)
        return
    network, inner = _parts(_read(config.dit, "AR-DiT"), config.dit)
    if not config.vae and not inner:
        raise ConfigError(f"{config.dit} holds no AR-VAE: give its checkpoint with --vae.")
    if config.vae and inner:
        print(f"{config.dit} holds an AR-VAE too, which is left aside for {config.vae}")
    dit = load_dit(
        network,
        num_heads=config.dit_heads,
        num_frames=config.num_frames,
        condition_attention="self" if config.strict_causal else "all",
        source=config.dit,
    )
    if not dit.config.condition_tokens:
        raise CheckpointError(f"{config.dit} has no condition tokens: {' or '.join(TABLES)} is missing.")
    vae = _autoencoder(config, _read(config.vae, "AR-VAE") if config.vae else inner, config.vae or config.dit)
    _describe(dit, vae)
    sizes = dit.config
    # Latents of length 1 are what the network was trained on: nothing is left to normalise.
    statistics = LatentStatistics.neutral(sizes.num_tokens, sizes.token_dim)
    ARDiffusionPipeline(vae, dit, DiffusionConfig(), statistics).save_pretrained(config.out)
    start = storage.join(config.out, "train_dit.yaml")
    storage.write_bytes(start, to_yaml(DiTStart(init_from=storage.absolute(config.out), dit=sizes)).encode())
    print(f"{config.out}: a pipeline; sample it with `ardiff generate pipeline={config.out} mode=full`")
    print(f"fine-tune it with `ardiff train-dit --config YOURS --config {start}`")
    if config.strict_causal:
        print(
            "Warning: with --strict-causal condition tokens no longer see the frames, as the weights were trained to. "
            "Outputs differ from the released model's until the pipeline is fine-tuned."
        )


def _import_vae(config: ImportConfig) -> None:
    if config.vae_from_titok:
        vae = vae_from_titok(
            _read(config.vae_from_titok, "TiTok's tokenizer"),
            num_heads=config.vae_heads,
            image_size=config.image_size,
            num_frames=config.num_frames,
            token_dim=config.token_dim,
            source=config.vae_from_titok,
        )
    else:
        vae = _autoencoder(config, _read(config.vae, "AR-VAE"), config.vae)
    _describe(vae)
    save_autoencoder(config.out, vae)
    start = storage.join(config.out, "train_vae.yaml")
    storage.write_bytes(
        start, to_yaml(AutoencoderStart(init_from=storage.absolute(config.out), vae=vae.config)).encode()
    )
    print(f"{config.out}: an AR-VAE; train it on with `ardiff train-vae --config YOURS --config {start}`")


def _autoencoder(config: ImportConfig, state: Mapping[str, Tensor], source: str) -> ARAutoencoder:
    return load_vae(
        state,
        num_heads=config.vae_heads,
        image_size=config.image_size,
        num_frames=config.num_frames,
        source=source,
    ).model


def _read(uri: str, what: str) -> dict[str, Tensor]:
    print(f"reading the {what} {uri}")
    return read_checkpoint(uri)


def _parts(state: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The network and its condition tokens, and the AR-VAE if there is one, of all that the authors' trainer kept.

    Raises:
        CheckpointError: The weights were trained under another noise schedule, or are unknown.
    """
    if not any(name.startswith(NETWORK) for name in state):
        return dict(state), {}
    network, vae, outer = {}, {}, NETWORK.split(".")[0] + "."
    for name, tensor in state.items():
        if name in TABLES:
            network[name] = tensor
        elif name.startswith(NETWORK):
            network[name.removeprefix(NETWORK)] = tensor
        elif name.startswith(VAE):
            vae[name.removeprefix(VAE)] = tensor
        elif not (name.startswith(outer) and name.removeprefix(outer) in SCHEDULE):
            raise CheckpointError(f"{source} is not a released checkpoint of this kind: {name} is unknown.")
    theirs, ours = state.get(f"{outer}alphas_cumprod"), DiffusionConfig().alphas_cumprod()
    if theirs is not None and (theirs.shape != ours.shape or not torch.allclose(theirs.double(), ours, atol=1e-2)):
        raise CheckpointError(f"{source} was trained under another noise schedule than the released models.")
    return network, vae


def _describe(*models: DiT | ARAutoencoder) -> None:
    for model in models:
        count = sum(p.numel() for p in model.parameters())
        if isinstance(model, DiT):
            c = model.config
            classes = f"{c.num_classes} classes" if c.num_classes else "no classes"
            said = f"{c.num_frames} frames, {classes}, {c.condition_tokens} condition tokens"
        else:
            kinds = {"clip": "temporal attention in clips", "none": "without temporal attention"}
            said = f"{model.config.resolution} x {model.config.resolution} pixels, {kinds[model.config.temporal]}"
        latents = f"latents {model.config.num_tokens} x {model.config.token_dim}"
        print(f"{'AR-DiT' if isinstance(model, DiT) else 'AR-VAE'}: {count:,} parameters, {latents}, {said}")
