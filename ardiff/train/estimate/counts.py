"""Counts parameters, operations and activations of the models.

The counts are exact for the code that runs: it is executed with tensors that have shapes but no memory, on models of
one and two blocks. Both counts are linear in the depth, so they are extrapolated to the full depth.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ardiff.dit import DiT, DiTConfig, TextTokens
from ardiff.metrics.networks.i3d import I3D
from ardiff.models import make_autoencoder, make_dit
from ardiff.sampling.cost import frame_evaluations
from ardiff.text.config import TextConfig
from ardiff.train.estimate.config import EstimateConfig
from ardiff.train.flops import FlopCounter
from ardiff.train.tasks.distill import evaluations_of_update
from ardiff.vae import ARAutoencoder, AutoencoderConfig

SizesT = TypeVar("SizesT", AutoencoderConfig, DiTConfig)
ModelT = TypeVar("ModelT", bound=nn.Module)

FVD_FRAMES = 16
"""Frames of a clip for FVD."""
TEXT_TOKENS = TextConfig().max_tokens
"""Tokens of a prompt: the default of text.max_tokens."""


@dataclass(frozen=True, slots=True)
class StepCounts:
    """Cost of a forward pass over one micro-batch."""

    parameters: int
    flops: float
    """Operations of the forward pass; a multiplication and an addition are two."""
    activations: float
    """Bytes kept for the backward pass."""
    block_activations: float
    """The part of ``activations`` that one block keeps."""
    block_input: float
    """Bytes of one block's input, which activation checkpointing keeps instead."""


def count_step(config: EstimateConfig) -> StepCounts:
    """Counts a forward pass over one micro-batch, with its mean squared error."""
    sizes, frames = config.sizes, config.micro_batch_size * config.num_frames
    one, two = (
        _count(dataclasses.replace(sizes, depth=depth), config.micro_batch_size, config.num_frames) for depth in (1, 2)
    )
    parameters, flops, elements = (a + (b - a) * (sizes.depth - 1) for a, b in zip(one, two, strict=True))
    if isinstance(sizes, DiTConfig):
        block_inputs, tokens = 1, sizes.num_tokens
    else:
        block_inputs, tokens = 2, sizes.num_patches + sizes.num_tokens
    block_input = float(block_inputs * frames * tokens * sizes.width * config.element_bytes)
    size = config.element_bytes
    return StepCounts(int(parameters), flops, elements * size, (two[2] - one[2]) * size, block_input)


def video_flops(config: EstimateConfig) -> float:
    """Operations of one generated video: evaluations of frames by the AR-DiT, and decoding by the AR-VAE."""
    params = config.sampling_params()
    evaluations = frame_evaluations(params, config.dit.num_frames) * frame_flops(config)
    return evaluations + text_flops(config.dit) + params.num_frames * decoder_flops(config.vae)


def frame_flops(config: EstimateConfig) -> float:
    """Operations of evaluating one frame by the AR-DiT in a clip of the length that it sees, without those of text."""
    model = dataclasses.replace(config, model="dit", num_frames=config.dit.num_frames)
    return (count_step(model).flops / model.micro_batch_size - text_flops(config.dit)) / model.num_frames


def distillation_flops(config: EstimateConfig) -> float:
    """Operations of one update of a student, with those of its teacher. A backward pass costs two forward passes."""
    teacher, student = evaluations_of_update(config.distill, config.num_frames)
    clips = config.micro_batch_size * config.gradient_accumulation * config.num_gpus
    return clips * (teacher + 3 * student) * frame_flops(config)


@functools.lru_cache
def text_flops(sizes: DiTConfig) -> float:
    """Operations of the keys and values of one prompt in all blocks; 0 for a model without text."""
    if not sizes.text:
        return 0.0
    return _at_depth(
        sizes, make_dit, lambda model: model.text_keys_values(torch.zeros(1, TEXT_TOKENS, sizes.condition_dim))
    )


@functools.lru_cache
def encoder_flops(sizes: AutoencoderConfig) -> float:
    """Operations of encoding one frame."""
    shape = (1, 1, 3, *sizes.resolution)
    return _at_depth(sizes, make_autoencoder, lambda model: model.encode(torch.zeros(shape)))


@functools.lru_cache
def decoder_flops(sizes: AutoencoderConfig) -> float:
    """Operations of decoding one frame: the mean over a clip that fills the decoder's window."""
    shape = (1, sizes.temporal_window, sizes.num_tokens, sizes.token_dim)
    return _at_depth(sizes, make_autoencoder, lambda model: model.decode(torch.zeros(shape))) / sizes.temporal_window


@functools.lru_cache
def i3d_flops() -> float:
    """Operations of the I3D features of one clip."""
    with FakeTensorMode():
        network, clip = I3D(), torch.zeros(1, 3, FVD_FRAMES, 224, 224)
        return _operations(lambda: network(clip))


def count_forward(model: nn.Module, batch_size: int, num_frames: int) -> tuple[int, int]:
    """Operations of a forward pass of an AR-DiT or AR-VAE with its loss, and float32 bytes kept for the backward."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, Any] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage
        return tensor

    with FlopCounter() as counter, torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        if isinstance(model, DiT):
            shape = (batch_size, num_frames, model.config.num_tokens, model.config.token_dim)
            timesteps = torch.zeros(batch_size, num_frames, dtype=torch.int64)
            target = torch.zeros(shape)
            text = None
            if model.config.text:
                states = torch.zeros(batch_size, TEXT_TOKENS, model.config.condition_dim)
                mask = torch.ones(batch_size, TEXT_TOKENS, dtype=torch.bool)
                text = TextTokens(states, mask, torch.arange(batch_size))
            output = model(torch.zeros(shape), timesteps, timesteps[:, 0], text)
        else:
            assert isinstance(model, ARAutoencoder)
            target = torch.zeros(batch_size, num_frames, 3, *model.config.resolution)
            noise = torch.zeros(batch_size, num_frames, model.config.num_tokens, model.config.token_dim)
            output, _ = model(target, noise, temporal=num_frames > 1)
        nn.functional.mse_loss(output, target)
    return counter.total, sum(storage.nbytes() for storage in saved.values())


@functools.lru_cache
def _count(sizes: AutoencoderConfig | DiTConfig, batch_size: int, num_frames: int) -> tuple[float, float, float]:
    """Parameters, operations of a forward pass, and elements that it keeps for the backward pass."""
    with FakeTensorMode():
        model: nn.Module = make_dit(sizes) if isinstance(sizes, DiTConfig) else make_autoencoder(sizes)
        flops, kept = count_forward(model, batch_size, num_frames)
    return float(sum(p.numel() for p in model.parameters())), float(flops), kept / 4


def _at_depth(sizes: SizesT, make_model: Callable[[SizesT], ModelT], call: Callable[[ModelT], object]) -> float:
    """Operations of ``call``, extrapolated from models of one and two blocks."""
    with FakeTensorMode():
        small = [make_model(dataclasses.replace(sizes, depth=depth)).eval() for depth in (1, 2)]
        one, two = (_operations(functools.partial(call, model)) for model in small)
    return one + (two - one) * (sizes.depth - 1)


def _operations(call: Callable[[], object]) -> float:
    with FlopCounter() as counter:
        call()
    return float(counter.total)
