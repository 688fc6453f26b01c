"""What distinguishes the authors' AR-VAE from the standard one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ardiff.models import make_autoencoder
from ardiff.randomness import BatchGenerator
from ardiff.resolution import Resolution
from ardiff.train.tasks import AutoencoderTask, AutoencoderTaskConfig
from ardiff.upstream.autoencoder import UpstreamAutoencoder, scramble
from ardiff.upstream.config import UpstreamAutoencoderConfig
from ardiff.vae import DecoderCache
from ardiff.vae.losses import recorded

FRAMES = 9
SIZES: dict[str, Any] = {
    "kind": "upstream",
    "resolution": 16,
    "patch_size": 16,
    "num_tokens": 2,
    "width": 16,
    "depth": 2,
    "num_heads": 2,
}


def latents(frames: int = FRAMES) -> Tensor:
    return torch.randn(1, frames, 2, 4, generator=torch.Generator().manual_seed(0))


def video(frames: int = 2) -> Tensor:
    return torch.rand(1, frames, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("train", [False, True])
def test_clips_do_not_see_each_other(make_vae, train: bool) -> None:
    """With clips of three frames, a frame reads the earlier frames of its clip, and no later one."""
    model = make_vae(temporal_window=3, **SIZES).train(train)
    with torch.no_grad():
        expected = model.decode(latents(5))
        for j in range(5):
            other = latents(5)
            other[:, j] += 2.0
            changed = (model.decode(other) != expected).any(dim=(0, 2, 3, 4))
            assert changed.tolist() == [j <= f and f // 3 == j // 3 for f in range(5)]


@pytest.mark.parametrize("split", [[9], [1] * 9, [4, 5], [1, 7, 1]])
def test_decoding_clips_in_chunks_equals_decoding_at_once(make_vae, split: list[int]) -> None:
    model = make_vae(temporal_window=4, **SIZES)
    with torch.no_grad():
        two = torch.cat([latents(), -latents().flip(1)])
        at_once, cache, parts = model.decode(two), DecoderCache(), []
        frames = 0
        for part in two.split(split, dim=1):
            parts.append(model.decode(part, cache))
            frames += part.shape[1]
            shapes = [tokens.shape for tokens in cache.tensors[1::2]]
            assert shapes == ([(2, frames % 4, 2, 16)] * 2 if frames % 4 else [])
    assert torch.allclose(torch.cat(parts, dim=1), at_once, rtol=0, atol=1e-5 * float(at_once.abs().max()))


def test_a_new_model_starts_as_a_decoder_of_single_frames() -> None:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = UpstreamAutoencoder(UpstreamAutoencoderConfig(**SIZES))
        assert torch.equal(model.decode(latents(5), temporal=True), model.decode(latents(5), temporal=False))


def test_a_decoder_without_temporal_attention(make_vae) -> None:
    model = make_vae(temporal="none", **SIZES)
    assert not any("temporal" in name for name in model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.decode(latents(3)), model.decode(latents(3), temporal=False))


def test_latent_tokens_are_scrambled_before_the_moments(make_vae) -> None:
    model = make_vae(**SIZES)
    with recorded(model.encoder.norm) as record:
        posterior = model.encode(video())
    read = record.output.flatten(1).view(-1, 16, 2).transpose(1, 2)  # (N, L C) read as (N, C, L)
    assert torch.equal(scramble(record.output), read)
    means = model.encoder.moments(read)[..., :4].view(1, 2, 2, 4)
    assert torch.allclose(posterior.mean, means, atol=1e-5)


def test_titoks_stem(make_vae) -> None:
    """A class token, which all others read, with a position of its own, and the exact GELU."""
    model = make_vae(**SIZES)
    assert model.encoder.patch_positions.shape == model.decoder.patch_positions.shape == (2, 16)
    assert {block.mlp.approximate for half in (model.encoder, model.decoder) for block in half.blocks} == {"none"}
    with torch.no_grad():
        mean, decoded = model.encode(video()).mean, model.decode(latents(1))
        for half in (model.encoder, model.decoder):
            half.stem.class_token.data *= -5.0
        assert not torch.allclose(model.encode(video()).mean, mean)
        assert not torch.allclose(model.decode(latents(1)), decoded)


def test_pixel_range_and_unit_latents(make_vae) -> None:
    """The networks work on pixels in [0, 1] and on latent tokens of length 1; video in and out is in [-1, 1]."""
    model = make_vae(**SIZES)
    with recorded(model.encoder.patch_in) as record, torch.no_grad():
        mean = model.encode(video()).mean
    assert 0 <= record.input.min() < record.input.max() <= 1
    with torch.no_grad():
        assert torch.allclose(model.latents(video()), mean / mean.norm(dim=-1, keepdim=True), atol=1e-6)
        assert torch.allclose(model.decode(3 * latents(1)), model.decode(latents(1)), atol=1e-5)
    assert model.config.unit_latents


def test_adversarial_training_reaches_the_convolutional_pixels() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make_autoencoder(UpstreamAutoencoderConfig(**{**SIZES, "resolution": 32}))
        task = AutoencoderTask(model, AutoencoderTaskConfig(adversarial_weight=1.0))
    assert not any("patch_out" in name for name in model.state_dict())
    batch = {"video": torch.randint(256, (1, 1, 32, 32, 3), dtype=torch.uint8)}
    loss, parts = task.loss(batch, 0, BatchGenerator("test"))
    loss.backward()
    assert float(parts["adaptive_weight"]) > 0
    assert model.decoder.pixels.conv_in.weight.grad.abs().sum() > 0


def test_gradients_reach_every_parameter(make_vae) -> None:
    model = make_vae(**SIZES).train()
    output, posterior = model(video(4), latents(4))
    (output.square().sum() + posterior.kl()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_patches_have_16_pixels() -> None:
    with pytest.raises(ValueError, match="kind=upstream needs patch_size 16, got 8"):
        UpstreamAutoencoderConfig(patch_size=8)


def test_frames_are_square() -> None:
    with pytest.raises(ValueError, match=r"square frames only, because .*, got 16x32: train a model"):
        UpstreamAutoencoderConfig(**{**SIZES, "resolution": (16, 32)})


def test_frames_of_another_shape_are_rejected(make_vae) -> None:
    model = make_vae(**SIZES)
    with pytest.raises(ValueError, match=r"knows frames of 16x16 .*, got 32x32"):
        model.encode(torch.zeros(1, 1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"knows frames of 16x16 .*, got 16x32"):
        model.decode(latents(1), shape=Resolution(16, 32))
