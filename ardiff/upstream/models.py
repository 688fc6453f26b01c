"""Released weights as models of ours: the sizes are read off the tensors, the choices are configuration.

Shapes: B batch, F frames, H W pixels, L tokens, D latent width, N condition tokens, K their width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from ardiff.dit import DiT, DiTConfig
from ardiff.errors import CheckpointError
from ardiff.pretrained import fill
from ardiff.upstream.keys import DIT_RULES, VAE_RULES, Rule, translate
from ardiff.vae import ARAutoencoder, AutoencoderConfig

ConditionAttention = Literal["self", "all", "full"]
TABLES = {"context_emb": "n k -> 1 n k", "class_emb": ""}
"""The condition tokens that the authors keep beside the network, without and with classes."""


def load_dit(
    state_dict: Mapping[str, Tensor],
    *,
    num_heads: int,
    num_frames: int,
    condition_attention: ConditionAttention,
    source: str = "The state_dict",
) -> DiT:
    """The released AR-DiT, in evaluation mode.

    Args:
        state_dict: Its weights by the release's names; and the condition tokens ``context_emb (N, K)`` or ``class_emb
            (classes + 1, N, K)``, if the model is to know them itself.
        num_heads: Attention heads; 16 in the release.
        num_frames: Frames of a clip, F; 16 in the release.
        condition_attention: What condition tokens see: ``self``: themselves only. ``all``: every frame too, as the
            released models were trained. ``full``: there is no mask at all, frames see later ones.
        source: What errors call the weights.

    Returns:
        A model to be called as ``model(latents (B, F, L, D), timesteps (B, F), condition (B, N, K))``, which gives the
        predicted clean latents ``(B, F, L, D)``. With condition tokens of its own, it takes class labels too.

    Raises:
        CheckpointError: A tensor is missing, unknown or of a wrong size.
    """
    if len(tables := [name for name in TABLES if name in state_dict]) > 1:
        raise CheckpointError(f"{source} is not a released checkpoint: it has both {' and '.join(tables)}.")
    config = dit_config(state_dict, num_heads, num_frames, condition_attention, source)
    with torch.device("meta"):
        sizes = DiT(config)
    rules = [*DIT_RULES, *(Rule(name, "condition.table", TABLES[name]) for name in tables)]
    return fill(DiT(config), translate(state_dict, rules, sizes, source), source).eval()


def dit_config(
    state: Mapping[str, Tensor], num_heads: int, num_frames: int, condition_attention: ConditionAttention, source: str
) -> DiTConfig:
    """The configuration of released weights; see :func:`load_dit`. Raises CheckpointError."""
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
        return DiTConfig(
            num_frames=num_frames,
            num_tokens=positions // num_frames,
            token_dim=token_dim,
            width=width,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=_shape(state, "blocks.0.mlp.fc1.weight", 2, source)[0] / width,
            num_classes=classes - 1,
            positions="table",
            attention="bidirectional" if condition_attention == "full" else "causal",
            condition="tokens",
            condition_tokens=condition_tokens,
            condition_dim=_shape(state, "c_embedder.weight", 2, source)[1],
            condition_attention="self" if condition_attention == "self" else "all",
            guidance_null="first_class" if "class_emb" in state and classes > 1 else "zero",
            residual="normed",
            final_norm="plain",
        )
    except ValueError as error:
        raise CheckpointError(f"{source} does not fit {num_heads} heads and {num_frames} frames: {error}.") from error


class ReleasedAutoencoder(nn.Module):
    """A released AR-VAE behind the release's own interface: frames in [0, 1], latents as they were encoded."""

    def __init__(self, model: ARAutoencoder) -> None:
        """``model`` is the same AR-VAE behind ours: video in [-1, 1]."""
        super().__init__()
        self.model = model

    def encode(self, frames: Tensor) -> Tensor:
        """The posterior's means ``(B, F, L, D)`` of ``frames (B, F, 3, H, W)`` in [0, 1]."""
        return self.model.encode(2 * frames - 1).mean

    def decode(self, latents: Tensor) -> Tensor:
        """The frames ``(B, F, 3, H, W)`` of ``latents (B, F, L, D)`` of any length, about in [0, 1], not clamped."""
        return (self.model.decode(latents) + 1) / 2


def load_vae(
    state_dict: Mapping[str, Tensor],
    *,
    num_heads: int,
    image_size: int,
    num_frames: int = 16,
    source: str = "The state_dict",
) -> ReleasedAutoencoder:
    """The released AR-VAE, with or without temporal attention in its decoder, in evaluation mode.

    Args:
        state_dict: Its weights by the release's names.
        num_heads: Attention heads; 16 in the release.
        image_size: Height and width of a frame in pixels; 256 in the release.
        num_frames: Frames of a clip in the temporal decoder; 16 in the release.
        source: What errors call the weights.

    Raises:
        CheckpointError: A tensor is missing, unknown or of a wrong size.
    """
    temporal: Literal["clip", "none"] = "clip" if any(".fine_temporal_blocks." in k for k in state_dict) else "none"
    config = vae_config(state_dict, num_heads, image_size, num_frames, temporal, source)
    with torch.device("meta"):
        sizes = ARAutoencoder(config)
    weights = translate(state_dict, VAE_RULES, sizes, source)
    return ReleasedAutoencoder(fill(ARAutoencoder(config), weights, source)).eval()


def vae_config(
    state: Mapping[str, Tensor],
    num_heads: int,
    image_size: int,
    num_frames: int,
    temporal: Literal["clip", "none"],
    source: str,
) -> AutoencoderConfig:
    """The configuration of released weights; see :func:`load_vae`. Raises CheckpointError."""
    width, token_dim = _shape(state, "decoder.decoder_embed.weight", 2, source)
    positions = _shape(state, "encoder.positional_embedding", 2, source)[0]
    try:
        config = AutoencoderConfig(
            resolution=image_size,
            patch_size=_shape(state, "encoder.patch_embed.weight", 4, source)[3],
            num_tokens=_shape(state, "latent_tokens", 2, source)[0],
            token_dim=token_dim,
            width=width,
            depth=_depth(state, "encoder.transformer.", source),
            num_heads=num_heads,
            mlp_ratio=_shape(state, "encoder.transformer.0.mlp.c_fc.weight", 2, source)[0] / width,
            temporal_window=num_frames,
            temporal=temporal,
            stem="titok",
            token_order="scrambled",
            pixels="convolutional",
            pixel_range="unit",
            unit_latents=True,
        )
    except ValueError as error:
        raise CheckpointError(f"{source} does not fit {num_heads} heads and {image_size} pixels: {error}.") from error
    if positions != (image_size // config.patch_size) ** 2 + 1:
        side = round((positions - 1) ** 0.5) * config.patch_size
        raise CheckpointError(f"{source} is for frames of {side} x {side} pixels, not {image_size}.")
    return config


LOG_VARIANCE = -6.0
"""Where the log variances of an AR-VAE from TiTok begin, which has none: small noise, so that the means decide."""


def vae_from_titok(
    state_dict: Mapping[str, Tensor], *, num_heads: int, image_size: int, num_frames: int, token_dim: int, source: str
) -> ARAutoencoder:
    """An AR-VAE to be trained on, from the public TiTok tokenizer of images (Sec. 4.1).

    The quantiser goes, and with it the later channels of the latents: the first ``token_dim`` of TiTok's 12 stay. The
    codebook of its pixel decoder becomes a linear layer. Temporal attention is added, which changes nothing yet.

    Raises:
        CheckpointError: A tensor is missing, unknown or of a wrong size, or there are fewer channels.
    """
    state = {name: tensor for name, tensor in state_dict.items() if not name.startswith("quantize.")}
    codes = "pixel_quantize.embedding.weight"
    if codes not in state:
        raise CheckpointError(f"{source} is not TiTok's tokenizer: {codes} is missing.")
    _shape(state, codes, 2, source)
    state["pixel_quantize_conv.weight"] = state.pop(codes).T[:, :, None, None]
    state["pixel_quantize_conv.bias"] = torch.zeros(len(state["pixel_quantize_conv.weight"]))
    channels, width, *kernel = _shape(state, "encoder.conv_out.weight", 4, source)
    if kernel != [1, 1]:
        raise CheckpointError(f"{source} is not TiTok's tokenizer: encoder.conv_out has a kernel of {tuple(kernel)}.")
    if channels < token_dim:
        raise CheckpointError(f"{source} has latents of {channels} channels, fewer than {token_dim}.")
    _shape(state, "encoder.conv_out.bias", 1, source)
    means, bias = state["encoder.conv_out.weight"][:token_dim], state["encoder.conv_out.bias"][:token_dim]
    state["encoder.conv_out.weight"] = torch.cat([means, means.new_zeros(token_dim, width, 1, 1)])
    state["encoder.conv_out.bias"] = torch.cat([bias, bias.new_full((token_dim,), LOG_VARIANCE)])
    _shape(state, "decoder.decoder_embed.weight", 2, source)
    state["decoder.decoder_embed.weight"] = state["decoder.decoder_embed.weight"][:, :token_dim]
    model = load_vae(state, num_heads=num_heads, image_size=image_size, num_frames=num_frames, source=source).model
    clips = ARAutoencoder(replace(model.config, temporal="clip"))
    fresh = {name: tensor for name, tensor in clips.named_parameters() if name.startswith("decoder.temporal.")}
    return fill(clips, {**fresh, **dict(model.named_parameters())}, source).eval()


def _shape(state: Mapping[str, Tensor], name: str, ndim: int, source: str) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError(f"{source} is not a released checkpoint of this kind: {name} is missing.")
    if state[name].ndim != ndim or not state[name].numel():
        raise CheckpointError(
            f"{source} is not a released checkpoint of this kind: {name} is {tuple(state[name].shape)}, "
            f"{ndim} axes are expected."
        )
    return tuple(state[name].shape)


def _depth(state: Mapping[str, Tensor], prefix: str, source: str) -> int:
    numbers = {name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)}
    if numbers != {str(i) for i in range(len(numbers))} or not numbers:
        raise CheckpointError(f"{source} does not have its layers {prefix}0, {prefix}1, ... in sequence.")
    return len(numbers)
