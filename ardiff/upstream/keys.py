"""Names of the released weights and ours, one rule a tensor; both ways, so that errors can name what is in the file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from einops import EinopsError, rearrange
from torch import Tensor, nn

from ardiff.errors import CheckpointError
from ardiff.vae.pixels import CHANNELS


@dataclass(frozen=True, slots=True)
class Rule:
    """A released tensor and ours; ``{i}`` and ``{j}`` stand for numbers. ``axes`` leads from theirs to ours."""

    theirs: str
    ours: str
    axes: str = ""


POINT = "o c 1 1 -> o c"
"""A convolution of 1 x 1 pixels as a linear layer."""


def _layer(theirs: str, ours: str, weight_axes: str = "") -> list[Rule]:
    """A layer with weight and bias."""
    return [Rule(f"{theirs}.weight", f"{ours}.weight", weight_axes), Rule(f"{theirs}.bias", f"{ours}.bias")]


def _attention(theirs: str, ours: str, packed: str, out: str) -> list[Rule]:
    """A ``torch.nn.MultiheadAttention``; ``packed`` and ``out`` are our names of its input and output projections."""
    inputs = [Rule(f"{theirs}.in_proj_{part}", f"{ours}.{packed}{part}") for part in ("weight", "bias")]
    return [*inputs, *_layer(f"{theirs}.out_proj", f"{ours}.{out}")]


def _vision_block(half: str) -> list[Rule]:
    theirs, ours = f"{half}.transformer.{{i}}", f"{half}.blocks.{{i}}"
    return [
        *_layer(f"{theirs}.ln_1", f"{ours}.norm1"),
        *_attention(f"{theirs}.attn", f"{ours}.attention", "qkv.", "proj"),
        *_layer(f"{theirs}.ln_2", f"{ours}.norm2"),
        *_layer(f"{theirs}.mlp.c_fc", f"{ours}.mlp.fc1"),
        *_layer(f"{theirs}.mlp.c_proj", f"{ours}.mlp.fc2"),
    ]


def _residual_block(theirs: str, ours: str) -> list[Rule]:
    return [
        *_layer(f"{theirs}.norm1", f"{ours}.norm1"),
        Rule(f"{theirs}.conv1.weight", f"{ours}.conv1.weight"),
        *_layer(f"{theirs}.norm2", f"{ours}.norm2"),
        Rule(f"{theirs}.conv2.weight", f"{ours}.conv2.weight"),
        Rule(f"{theirs}.nin_shortcut.weight", f"{ours}.shortcut.weight"),
    ]


def _pixel_stage(number: int) -> list[Rule]:
    """Theirs count from the pixels up, ours from the patches on."""
    theirs, ours = f"pixel_decoder.up.{number}", f"decoder.pixels.stages.{len(CHANNELS) - 1 - number}"
    upsample = _layer(f"{theirs}.upsample_conv", f"{ours}.upsample")
    return [*_residual_block(f"{theirs}.block.{{j}}", f"{ours}.blocks.{{j}}"), *upsample]


DIT_RULES = [
    Rule("pos_embed", "position_embedding", "1 (f l) c -> f l c"),
    *_layer("x_embedder", "token_in"),
    *_layer("t_embedder.mlp.0", "timestep_embedder.fc1"),
    *_layer("t_embedder.mlp.2", "timestep_embedder.fc2"),
    *_layer("c_embedder", "condition.project"),
    *_layer("blocks.{i}.attn.qkv", "blocks.{i}.attention.qkv"),
    *_layer("blocks.{i}.attn.proj", "blocks.{i}.attention.proj"),
    *_layer("blocks.{i}.mlp.fc1", "blocks.{i}.mlp.fc1"),
    *_layer("blocks.{i}.mlp.fc2", "blocks.{i}.mlp.fc2"),
    *_layer("blocks.{i}.adaLN_modulation.1", "blocks.{i}.modulation"),
    *_layer("final_layer.1", "token_out"),
]

VAE_RULES = [
    Rule("latent_tokens", "encoder.latent_tokens"),
    Rule("encoder.class_embedding", "encoder.stem.class_token"),
    Rule("encoder.positional_embedding", "encoder.patch_positions"),
    Rule("encoder.latent_token_positional_embedding", "encoder.token_positions"),
    *_layer("encoder.patch_embed", "encoder.patch_in", "o c p q -> o (p q c)"),
    *_layer("encoder.ln_pre", "encoder.stem.norm"),
    *_vision_block("encoder"),
    *_layer("encoder.ln_post", "encoder.norm"),
    *_layer("encoder.conv_out", "encoder.moments", POINT),
    Rule("decoder.class_embedding", "decoder.stem.class_token"),
    Rule("decoder.positional_embedding", "decoder.patch_positions"),
    Rule("decoder.mask_token", "decoder.placeholder", "1 1 c -> c"),
    Rule("decoder.latent_token_positional_embedding", "decoder.token_positions"),
    *_layer("decoder.decoder_embed", "decoder.token_in"),
    *_layer("decoder.ln_pre", "decoder.stem.norm"),
    *_vision_block("decoder"),
    *_layer("decoder.fine_temporal_blocks.{i}.ln_1", "decoder.temporal.{i}.fine_norm"),
    *_attention("decoder.fine_temporal_blocks.{i}.attn", "decoder.temporal.{i}.fine", "in_proj_", "out_proj"),
    *_layer("decoder.coarse_temporal_blocks.{i}.ln_q", "decoder.temporal.{i}.query_norm"),
    *_layer("decoder.coarse_temporal_blocks.{i}.ln_k", "decoder.temporal.{i}.key_norm"),
    *_layer("decoder.coarse_temporal_blocks.{i}.ln_v", "decoder.temporal.{i}.value_norm"),
    *_attention("decoder.coarse_temporal_blocks.{i}.attn", "decoder.temporal.{i}.coarse", "in_proj_", "out_proj"),
    *_layer("decoder.ln_post", "decoder.norm"),
    *_layer("decoder.ffn.0", "decoder.pixels.logits.0", POINT),
    *_layer("decoder.ffn.2", "decoder.pixels.logits.2", POINT),
    *_layer("pixel_quantize_conv", "decoder.pixels.codes", POINT),
    *_layer("pixel_decoder.conv_in", "decoder.pixels.conv_in"),
    *_residual_block("pixel_decoder.mid.{j}", "decoder.pixels.middle.{j}"),
    *(rule for number in range(len(CHANNELS)) for rule in _pixel_stage(number)),
    *_layer("pixel_decoder.norm_out", "decoder.pixels.norm"),
    *_layer("pixel_decoder.conv_out", "decoder.pixels.conv_out"),
]


def translate(state: Mapping[str, Tensor], rules: Iterable[Rule], model: nn.Module, source: str) -> dict[str, Tensor]:
    """Released weights under our names, with the shapes that ``model`` has (it may be on the meta device).

    Raises:
        CheckpointError: Names what is missing of the model, what is not part of it, or the first wrong size.
    """
    rules = list(rules)
    wanted = dict(model.named_parameters())
    names = {_rename(name, rule.ours, rule.theirs): (name, rule) for name in wanted for rule in _of(name, rules)}
    missing, unknown = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
    if missing or unknown:
        said = [f"{_some(missing)} missing"] if missing else []
        said += [f"{_some(unknown)} unknown"] if unknown else []
        raise CheckpointError(f"{source} is not a released checkpoint of this kind: {'; '.join(said)}.")
    translated = {}
    for theirs, (name, rule) in names.items():
        tensor = state[theirs]
        try:
            tensor = rearrange(tensor, rule.axes, **_known_axes(rule, wanted[name])) if rule.axes else tensor
        except EinopsError:
            raise CheckpointError(_wrong_size(source, theirs, state[theirs], wanted[name])) from None
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(_wrong_size(source, theirs, state[theirs], wanted[name]))
        if not tensor.is_floating_point():
            raise CheckpointError(f"{source}: {theirs} holds {tensor.dtype}, not floating-point numbers.")
        translated[name] = tensor
    return translated


def _known_axes(rule: Rule, parameter: Tensor) -> dict[str, int]:
    """The one axis that einops cannot know: how many frames the positions are for."""
    return {"f": parameter.shape[0]} if "(f l)" in rule.axes else {}


def _wrong_size(source: str, theirs: str, tensor: Tensor, parameter: Tensor) -> str:
    return (
        f"{source} is not a released checkpoint of these sizes: {theirs} is {tuple(tensor.shape)}, the model that the "
        f"other tensors speak of has {tuple(parameter.shape)} there."
    )


def _of(name: str, rules: list[Rule]) -> list[Rule]:
    found = [rule for rule in rules if _pattern(rule.ours).fullmatch(name)]
    assert len(found) == 1, name
    return found


def _rename(name: str, old: str, new: str) -> str:
    match = _pattern(old).fullmatch(name)
    assert match is not None
    return new.format(**match.groupdict())


def _pattern(name: str) -> re.Pattern[str]:
    text = re.escape(name)
    for letter in "ij":
        text = text.replace(rf"\{{{letter}\}}", rf"(?P<{letter}>\d+)")
    return re.compile(text)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
