"""The authors' weights as our models: sizes are read off the tensors, head counts and frames are given.

Shapes: B videos, F frames, L latent tokens, D latent width, M condition tokens, E their width.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ardiff.errors import CheckpointError
from ardiff.resolution import Resolution
from ardiff.tensors import fill
from ardiff.upstream.autoencoder import UpstreamAutoencoder
from ardiff.upstream.config import UpstreamAutoencoderConfig, UpstreamDiTConfig
from ardiff.upstream.dit import UpstreamDiT
from ardiff.upstream.keys import DIT_RULES, VAE_RULES, Rule, translate

ConditionAttention = Literal["self", "all", "full"]
TABLES = {"context_emb": "m e -> 1 m e", "class_emb": ""}
"""The condition tokens that the authors store beside the network, without and with classes."""
LOG_VARIANCE = -6.0
"""Initial log variances of an AR-VAE made from TiTok, which has none: small noise, so that the means decide."""


def load_dit(
    state: Mapping[str, Tensor],
    *,
    num_heads: int,
    num_frames: int,
    condition_attention: ConditionAttention,
    source: str = "The state_dict",
) -> UpstreamDiT:
    """The authors' AR-DiT, in evaluation mode.

    Args:
        state: Its weights by the authors' names. May include the condition tokens ``context_emb (M, E)`` or
            ``class_emb (classes + 1, M, E)``; then the model takes class labels too.
        num_heads: Attention heads; the authors use 16.
        num_frames: Frames of a clip, F; the authors use 16.
        condition_attention: What condition tokens see. ``self``: only one another. ``all``: every frame too, as the
            authors trained. ``full``: no mask at all, so frames see later ones.
        source: Name of the weights in errors.

    Returns:
        A model to be called as ``model(latents (B, F, L, D), timesteps (B, F), condition (B, M, E))``, which returns
        predicted clean latents ``(B, F, L, D)``.

    Raises:
        CheckpointError: A tensor is missing, unknown or of a wrong size.
    """
    if len(tables := [name for name in TABLES if name in state]) > 1:
        raise CheckpointError(f"{source} is not an upstream checkpoint: it has both {' and '.join(tables)}.")
    config = dit_config(state, num_heads, num_frames, condition_attention, source)
    with torch.device("meta"):
        sizes = UpstreamDiT(config)
    rules = [*DIT_RULES, *(Rule(name, "condition.table", TABLES[name]) for name in tables)]
    return fill(UpstreamDiT(config), translate(state, rules, sizes, source), source).eval()


def dit_config(
    state: Mapping[str, Tensor], num_heads: int, num_frames: int, condition_attention: ConditionAttention, source: str
) -> UpstreamDiTConfig:
    """The configuration of the authors' weights; see :func:`load_dit`. Raises CheckpointError."""
    positions = _shape(state, "pos_embed", 3, source)[1]
    width, token_dim = _shape(state, "x_embedder.weight", 2, source)
    depth = _depth(state, "blocks.", source)
    if num_frames < 1 or positions % num_frames:
        raise CheckpointError(f"{source}: {positions} positions (pos_embed) do not divide into {num_frames} frames.")
    if "class_emb" in state:
        classes, condition_tokens, _ = _shape(state, "class_emb", 3, source)
    else:
        classes, condition_tokens = 1, _shape(state, "context_emb", 2, source)[0] if "context_emb" in state else 0
    try:
        return UpstreamDiTConfig(
            num_frames=num_frames,
            num_tokens=positions // num_frames,
            token_dim=token_dim,
            width=width,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=_shape(state, "blocks.0.mlp.fc1.weight", 2, source)[0] / width,
            num_classes=classes - 1,
            attention="bidirectional" if condition_attention == "full" else "causal",
            condition_tokens=condition_tokens,
            condition_dim=_shape(state, "c_embedder.weight", 2, source)[1],
            condition_attention="self" if condition_attention == "self" else "all",
            guidance_null="first_class" if "class_emb" in state and classes > 1 else "zero",
        )
    except ValueError as error:
        raise CheckpointError(f"{source} does not fit {num_heads} heads and {num_frames} frames: {error}.") from error


def load_vae(
    state: Mapping[str, Tensor],
    *,
    num_heads: int,
    image_size: int,
    num_frames: int = 16,
    source: str = "The state_dict",
) -> UpstreamAutoencoder:
    """The authors' AR-VAE, with or without temporal attention in its decoder, in evaluation mode.

    Args:
        state: Its weights by the authors' names.
        num_heads: Attention heads; the authors use 16.
        image_size: Height and width of a frame in pixels; the authors use 256.
        num_frames: Frames of a clip in the temporal decoder; the authors use 16.
        source: Name of the weights in errors.

    Raises:
        CheckpointError: A tensor is missing, unknown or of a wrong size.
    """
    temporal: Literal["clip", "none"] = "clip" if any(".fine_temporal_blocks." in k for k in state) else "none"
    config = vae_config(state, num_heads, image_size, num_frames, temporal, source)
    with torch.device("meta"):
        sizes = UpstreamAutoencoder(config)
    return fill(UpstreamAutoencoder(config), translate(state, VAE_RULES, sizes, source), source).eval()


def vae_config(
    state: Mapping[str, Tensor],
    num_heads: int,
    image_size: int,
    num_frames: int,
    temporal: Literal["clip", "none"],
    source: str,
) -> UpstreamAutoencoderConfig:
    """The configuration of the authors' weights; see :func:`load_vae`. Raises CheckpointError."""
    width, token_dim = _shape(state, "decoder.decoder_embed.weight", 2, source)
    positions = _shape(state, "encoder.positional_embedding", 2, source)[0]
    try:
        config = UpstreamAutoencoderConfig(
            resolution=Resolution.square(image_size),
            patch_size=_shape(state, "encoder.patch_embed.weight", 4, source)[3],
            num_tokens=_shape(state, "latent_tokens", 2, source)[0],
            token_dim=token_dim,
            width=width,
            depth=_depth(state, "encoder.transformer.", source),
            num_heads=num_heads,
            mlp_ratio=_shape(state, "encoder.transformer.0.mlp.c_fc.weight", 2, source)[0] / width,
            temporal_window=num_frames,
            temporal=temporal,
        )
    except ValueError as error:
        raise CheckpointError(f"{source} does not fit {num_heads} heads and {image_size} pixels: {error}.") from error
    if positions != config.num_patches + 1:
        side = round((positions - 1) ** 0.5) * config.patch_size
        raise CheckpointError(f"{source} is for frames of {side} x {side} pixels, not {image_size}.")
    return config


def vae_from_titok(
    state: Mapping[str, Tensor], *, num_heads: int, image_size: int, num_frames: int, token_dim: int, source: str
) -> UpstreamAutoencoder:
    """A new AR-VAE from the public TiTok image tokenizer, as Sec. 4.1 starts training.

    The quantiser is dropped, and of TiTok's 12 latent channels the first ``token_dim`` are kept. The codebook of its
    pixel decoder becomes a linear layer. Temporal attention is added with zero output.

    Raises:
        CheckpointError: A tensor is missing, unknown or of a wrong size, or there are fewer channels.
    """
    weights = {name: tensor for name, tensor in state.items() if not name.startswith("quantize.")}
    codes = "pixel_quantize.embedding.weight"
    if codes not in weights:
        raise CheckpointError(f"{source} is not TiTok's tokenizer: {codes} is missing.")
    _shape(weights, codes, 2, source)
    weights["pixel_quantize_conv.weight"] = weights.pop(codes).T[:, :, None, None]
    weights["pixel_quantize_conv.bias"] = torch.zeros(len(weights["pixel_quantize_conv.weight"]))
    channels, width, *kernel = _shape(weights, "encoder.conv_out.weight", 4, source)
    if kernel != [1, 1]:
        raise CheckpointError(f"{source} is not TiTok's tokenizer: encoder.conv_out has a kernel of {tuple(kernel)}.")
    if channels < token_dim:
        raise CheckpointError(f"{source} has latents of {channels} channels, fewer than {token_dim}.")
    _shape(weights, "encoder.conv_out.bias", 1, source)
    means, bias = weights["encoder.conv_out.weight"][:token_dim], weights["encoder.conv_out.bias"][:token_dim]
    weights["encoder.conv_out.weight"] = torch.cat([means, means.new_zeros(token_dim, width, 1, 1)])
    weights["encoder.conv_out.bias"] = torch.cat([bias, bias.new_full((token_dim,), LOG_VARIANCE)])
    _shape(weights, "decoder.decoder_embed.weight", 2, source)
    weights["decoder.decoder_embed.weight"] = weights["decoder.decoder_embed.weight"][:, :token_dim]
    frames = load_vae(weights, num_heads=num_heads, image_size=image_size, num_frames=num_frames, source=source)
    clips = UpstreamAutoencoder(replace(frames.config, temporal="clip"))
    new = {name: tensor for name, tensor in clips.named_parameters() if name.startswith("decoder.temporal.")}
    return fill(clips, {**new, **dict(frames.named_parameters())}, source).eval()


def _shape(state: Mapping[str, Tensor], name: str, ndim: int, source: str) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError(f"{source} is not an upstream checkpoint of this kind: {name} is missing.")
    if state[name].ndim != ndim or not state[name].numel():
        raise CheckpointError(
            f"{source} is not an upstream checkpoint of this kind: {name} is {tuple(state[name].shape)}, "
            f"{ndim} axes are expected."
        )
    return tuple(state[name].shape)


def _depth(state: Mapping[str, Tensor], prefix: str, source: str) -> int:
    """Number of layers ``prefix0``, ``prefix1``, ..."""
    numbers = {name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)}
    if numbers != {str(i) for i in range(len(numbers))} or not numbers:
        raise CheckpointError(f"{source} does not have its layers {prefix}0, {prefix}1, ... in sequence.")
    return len(numbers)
