"""Names of the authors' tensors and of our parameters: one rule each, used both ways, so that errors name entries."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from einops import EinopsError, rearrange
from torch import Tensor, nn

from ardiff.errors import CheckpointError
from ardiff.upstream.pixels import CHANNELS


@dataclass(frozen=True, slots=True)
class Rule:
    """The authors' name of a tensor and our parameter's; ``{i}`` and ``{j}`` stand for numbers."""

    source: str
    target: str
    axes: str = ""
    """Einops pattern from the authors' axes to ours; empty if they are equal."""


POINT = "o c 1 1 -> o c"
"""A convolution with a kernel of 1 x 1 as a linear layer."""


def _layer(source: str, target: str, weight_axes: str = "") -> list[Rule]:
    """A layer with weight and bias."""
    return [Rule(f"{source}.weight", f"{target}.weight", weight_axes), Rule(f"{source}.bias", f"{target}.bias")]


def _attention(source: str, target: str, in_proj: str, out_proj: str) -> list[Rule]:
    """A ``torch.nn.MultiheadAttention``; ``in_proj`` and ``out_proj`` are our names of its projections."""
    inputs = [Rule(f"{source}.in_proj_{name}", f"{target}.{in_proj}{name}") for name in ("weight", "bias")]
    return [*inputs, *_layer(f"{source}.out_proj", f"{target}.{out_proj}")]


def _vision_block(half: str) -> list[Rule]:
    source, target = f"{half}.transformer.{{i}}", f"{half}.blocks.{{i}}"
    return [
        *_layer(f"{source}.ln_1", f"{target}.norm1"),
        *_attention(f"{source}.attn", f"{target}.attention", "qkv.", "proj"),
        *_layer(f"{source}.ln_2", f"{target}.norm2"),
        *_layer(f"{source}.mlp.c_fc", f"{target}.mlp.fc1"),
        *_layer(f"{source}.mlp.c_proj", f"{target}.mlp.fc2"),
    ]


def _residual_block(source: str, target: str) -> list[Rule]:
    return [
        *_layer(f"{source}.norm1", f"{target}.norm1"),
        Rule(f"{source}.conv1.weight", f"{target}.conv1.weight"),
        *_layer(f"{source}.norm2", f"{target}.norm2"),
        Rule(f"{source}.conv2.weight", f"{target}.conv2.weight"),
        Rule(f"{source}.nin_shortcut.weight", f"{target}.shortcut.weight"),
    ]


def _pixel_stage(number: int) -> list[Rule]:
    """The authors count stages from pixels to patches, we from patches to pixels."""
    source, target = f"pixel_decoder.up.{number}", f"decoder.pixels.stages.{len(CHANNELS) - 1 - number}"
    upsample = _layer(f"{source}.upsample_conv", f"{target}.upsample")
    return [*_residual_block(f"{source}.block.{{j}}", f"{target}.blocks.{{j}}"), *upsample]


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
    *_layer("final_layer.1", "final_layer.project"),
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
    """The authors' weights under our names, with the shapes of ``model``, which may be on the meta device.

    Raises:
        CheckpointError: Names the missing tensors, the unknown ones, or the first of a wrong size or type.
    """
    rules = list(rules)
    parameters = dict(model.named_parameters())
    entries = {}
    for name in parameters:
        (rule,) = (rule for rule in rules if _pattern(rule.target).fullmatch(name))
        entries[_rename(name, rule.target, rule.source)] = name, rule
    missing, unknown = sorted(entries.keys() - state.keys()), sorted(state.keys() - entries.keys())
    if missing or unknown:
        problems = [f"{_some(missing)} missing"] if missing else []
        problems += [f"{_some(unknown)} unknown"] if unknown else []
        raise CheckpointError(f"{source} is not an upstream checkpoint of this kind: {'; '.join(problems)}.")
    return {
        name: _to_our_axes(state[key], rule, parameters[name], f"{source}: {key}")
        for key, (name, rule) in entries.items()
    }


def _to_our_axes(tensor: Tensor, rule: Rule, parameter: Tensor, what: str) -> Tensor:
    """``tensor`` with the axes of ``parameter``. Raises CheckpointError if its size or type is wrong."""
    try:
        # einops cannot infer the number of frames that the positions are for.
        known = {"f": parameter.shape[0]} if "(f l)" in rule.axes else {}
        translated = rearrange(tensor, rule.axes, **known) if rule.axes else tensor
    except EinopsError:
        translated = tensor.new_empty(0)
    if translated.shape != parameter.shape:
        raise CheckpointError(f"{what} is {tuple(tensor.shape)}, but the other tensors need {tuple(parameter.shape)}.")
    if not tensor.is_floating_point():
        raise CheckpointError(f"{what} holds {tensor.dtype}, not floating-point numbers.")
    return translated


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
