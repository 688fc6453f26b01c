"""The AR-VAE: the encoder sees single frames, the decoder is causal, and decoding in chunks equals decoding at once."""

import pytest
import torch

from ardiff.resolution import Resolution
from ardiff.vae import ARAutoencoder, AutoencoderConfig, DecoderCache, Posterior
from ardiff.vae.blocks import patchify, unpatchify

FRAMES = 9
SIZES = {"resolution": 16, "patch_size": 8, "num_tokens": 2, "width": 16, "depth": 2, "num_heads": 2}


def latents(frames: int = FRAMES, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, frames, 2, 4, generator=torch.Generator().manual_seed(0))


def video(frames: int = FRAMES) -> torch.Tensor:
    return torch.rand(2, frames, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("window", [1, 2, 3, 20])
def test_a_frame_reads_the_last_window_of_latents_and_no_later_one(make_vae, window, train):
    model = make_vae(temporal_window=window).train(train)
    expected = model.decode(latents())
    for j in range(FRAMES):
        other = latents()
        other[:, j] += 2.0
        changed = (model.decode(other) != expected).any(dim=(0, 2, 3, 4))
        assert changed.tolist() == [j <= f < j + window for f in range(FRAMES)]


@pytest.mark.parametrize("window", [1, 3, 5, 20])
@pytest.mark.parametrize("split", [[9], [1] * 9, [4, 5], [1, 7, 1], [2, 2, 2, 2, 1], [8, 1]])
def test_decoding_in_chunks_equals_decoding_at_once(make_vae, window, split):
    model = make_vae(temporal_window=window)
    at_once, cache, parts = model.decode(latents()), DecoderCache(), []
    frames = 0
    for part in latents().split(split, dim=1):
        parts.append(model.decode(part, cache))
        frames += part.shape[1]
        assert cache.tensors[0].shape == (2, min(frames, window - 1), 2, 16)
    assert torch.allclose(torch.cat(parts, dim=1), at_once, rtol=0, atol=1e-6 * float(at_once.abs().max()))


def test_the_cache_holds_no_graph_and_does_not_grow(make_vae):
    model, cache, sizes = make_vae(temporal_window=4), DecoderCache(), set()
    for part in latents(frames=60, batch=1).split(5, dim=1):
        model.decode(part, cache)
        assert not cache.tensors[0].requires_grad
        sizes.add(cache.tensors[0].numel())
    assert len(sizes) == 1


@pytest.mark.parametrize("chunk", [1, 2, 4, 100])
def test_decode_long(make_vae, chunk):
    model = make_vae()
    at_once, result = model.decode(latents(23)), model.decode_long(latents(23), chunk)
    assert not result.requires_grad
    assert torch.allclose(result, at_once, rtol=0, atol=1e-6 * float(at_once.detach().abs().max()))


def test_without_temporal_attention_each_frame_is_decoded_alone(make_vae):
    model = make_vae()
    expected = model.decode(latents(), temporal=False)
    other = latents()
    other[:, 4] += 2.0
    changed = (model.decode(other, temporal=False) != expected).any(dim=(0, 2, 3, 4))
    assert changed.nonzero().flatten().tolist() == [4]
    assert not torch.allclose(expected, model.decode(latents()), rtol=1e-2, atol=1e-2)


def test_a_new_model_starts_as_a_decoder_of_single_frames() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ARAutoencoder(AutoencoderConfig(**SIZES))
    assert torch.equal(model.decode(latents(), temporal=True), model.decode(latents(), temporal=False))


def test_each_frame_is_encoded_alone(make_vae):
    model = make_vae()
    expected = model.encode(video())
    other = video()
    other[1, 3] = -other[1, 3]
    changed = model.encode(other)
    for output, before in ((changed.mean, expected.mean), (changed.log_variance, expected.log_variance)):
        assert (output != before).any(dim=(2, 3)).nonzero().tolist() == [[1, 3]]
    one = model.encode(video()[:1, 5:6]).mean
    assert torch.allclose(one, expected.mean[:1, 5:6], rtol=1e-4, atol=1e-5)


def test_shapes_and_forward(make_vae):
    model, noise = make_vae(), latents()
    output, posterior = model(video(), noise)
    assert output.shape == video().shape
    assert posterior.mean.shape == posterior.log_variance.shape == (2, FRAMES, 2, 4)
    assert torch.equal(output, model.decode(posterior.mean + (0.5 * posterior.log_variance).exp() * noise))
    assert torch.equal(model(video(), noise, temporal=False)[0], model.decode(posterior.sample(noise), temporal=False))
    assert model.device.type == "cpu"


def test_a_patch_decodes_to_the_pixels_at_its_position(make_vae):
    """A change in one corner of the output comes from that corner's placeholder."""
    model = make_vae()
    expected = model.decode(latents(), temporal=False)
    for block in model.decoder.blocks:  # no mixing between patches
        block.attention.proj.weight.data.zero_()
    single = model.decode(latents(), temporal=False)
    model.decoder.patch_positions.data[1] += 1.0  # row 0, column 1
    changed = (model.decode(latents(), temporal=False) != single).any(dim=2).all(dim=(0, 1))
    assert changed[:8, 8:].float().mean() > 0.9
    assert not changed[8:].any()
    assert not changed[:, :8].any()
    assert not torch.equal(single, expected)


def test_kl_of_the_standard_normal_is_zero() -> None:
    zeros = torch.zeros(1, 2, 3, 4)
    assert float(Posterior(zeros, zeros).kl()) == 0.0
    assert float(Posterior(zeros + 2.0, zeros).kl()) == pytest.approx(2.0)
    wide = Posterior(zeros + 1.0, zeros + 0.7)
    normal = torch.distributions.Normal(1.0, float(torch.tensor(0.35).exp()))
    exact = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    assert float(wide.kl()) == pytest.approx(float(exact), rel=1e-6)


def test_log_variances_are_bounded(make_vae):
    model = make_vae()
    model.encoder.moments.bias.data[4:] = 1000.0
    assert model.encode(video()).log_variance.max() == 10.0


def test_a_decoder_without_temporal_attention(make_vae):
    model = make_vae(temporal="none")
    assert not any("temporal" in name for name in model.state_dict())
    assert torch.equal(model.decode(latents()), model.decode(latents(), temporal=False))
    assert torch.allclose(model.decode(latents(), DecoderCache())[:, 3:4], model.decode(latents()[:, 3:4]), atol=1e-5)


def test_gradients_reach_every_parameter(make_vae):
    model = make_vae().train()
    output, posterior = model(video(), latents())
    (output.square().sum() + posterior.kl()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_size_with_the_defaults() -> None:
    with torch.device("meta"):
        model = ARAutoencoder(AutoencoderConfig())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(708e6, abs=0.5e6)
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 250}, "resolution 250 must be a multiple of patch_size 16"),
        ({"resolution": (256, 250)}, r"resolution \[256, 250\] must be a multiple of patch_size 16"),
        ({"buckets": [(256, 250)]}, r"resolution \[256, 250\] must be a multiple"),
        ({"buckets": [(256, 512), 256]}, "different shapes, got 256x256, 256x512, 256x256"),
        ({"resolution": 0}, "at least 1"),
        ({"resolution": (16, 0)}, "at least 1"),
        ({"resolution": (16, 16, 16)}, "one number or"),
        ({"patch_size": 0}, "at least 1"),
        ({"num_heads": 0}, "at least 1"),
        ({"num_heads": 3}, "multiple of num_heads"),
        ({"width": 18, "num_heads": 2}, "of 4"),
        ({"num_tokens": 0}, "at least 1"),
        ({"token_dim": 0}, "at least 1"),
        ({"depth": 0}, "at least 1"),
        ({"temporal_window": 0}, "at least 1"),
    ],
)
def test_impossible_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(**changes)


@pytest.mark.parametrize("resolution", [(16, 40), (40, 16), (24, 24)])
def test_positions_are_by_row_and_column(make_vae, resolution):
    """A frame whose patches differ only in their row, or column, is a frame of the shape turned."""
    model = make_vae(resolution=list(resolution), num_tokens=2)
    rows, columns = model.config.patch_grid()
    assert (8 * rows, 8 * columns) == resolution
    assert model.encoder.patch_positions.shape == (rows * columns, 16)
    frames = torch.rand(2, 3, 3, *resolution, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(unpatchify(patchify(frames[:, 0], 8), 8, (rows, columns)), frames[:, 0])
    assert model.encode(frames).mean.shape == (2, 3, 2, 4)
    assert model.decode(latents(3)).shape == (2, 3, 3, *resolution)
    new = ARAutoencoder(AutoencoderConfig(**{**SIZES, "resolution": resolution}))
    for positions in (new.encoder.patch_positions, new.decoder.patch_positions):
        grid = positions.unflatten(
            0, (rows, columns)
        )  # (rows, columns, C): half of the channels by row, half by column
        assert torch.equal(grid[:, :, :8], grid[:, :1, :8].expand(-1, columns, -1))
        assert torch.equal(grid[:, :, 8:], grid[:1, :, 8:].expand(rows, -1, -1))
        assert torch.equal(grid[:2, 0, :8], grid[0, :2, 8:])


def test_a_patch_of_a_rectangle_is_decoded_where_it_was(make_vae):
    """Only the position of a patch tells its place: with that of another place, exactly these pixels change."""
    model = make_vae(resolution=[16, 40])
    with torch.no_grad():
        for block in model.decoder.blocks:
            block.attention.proj.weight.zero_()
        expected = model.decode(latents(2))
        model.decoder.patch_positions[1 * 5 + 3] += 1.0  # the second row, the fourth column
    changed = (model.decode(latents(2)) != expected).any(dim=(0, 1, 2))  # (H, W)
    place = torch.zeros(16, 40, dtype=torch.bool)
    place[8:16, 24:32] = True
    assert torch.equal(changed, place)


SHAPES = {"resolution": [24, 24], "buckets": [[16, 40], [40, 16]]}


def test_a_model_of_several_shapes(make_vae):
    model, square = make_vae(**SHAPES), make_vae(resolution=24)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in square.parameters())
    assert torch.equal(model.decode(latents(3)), square.decode(latents(3)))  # the first shape is as without the others
    for shape in model.config.shapes:
        frames = torch.rand(2, 3, 3, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        posterior = model.encode(frames)
        assert posterior.mean.shape == (2, 3, 2, 4)
        noise = torch.zeros_like(posterior.mean)
        output, _ = model(frames, noise)
        assert output.shape == frames.shape
        expected = model.decode(posterior.mean, shape=shape)
        assert torch.equal(output, expected)
        cache = DecoderCache()
        parts = [model.decode(part, cache, shape=shape) for part in posterior.mean.split(1, dim=1)]
        assert torch.allclose(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
        assert torch.equal(model.decode_long(posterior.mean, 8, shape), expected)
    assert not torch.equal(model.decode(latents(1), shape=(16, 40)).mT, model.decode(latents(1), shape=(40, 16)))


def test_gradients_of_every_shape_reach_the_positions(make_vae):
    model = make_vae(**SHAPES)
    for shape in model.config.shapes:
        model.zero_grad()
        model(torch.zeros(1, 2, 3, *shape), torch.zeros(1, 2, 2, 4))[0].square().mean().backward()
        for half in (model.encoder, model.decoder):
            assert (half.patch_positions.grad.abs().amax(dim=1) > 0).all()


def test_a_shape_that_the_model_does_not_know(make_vae):
    for model, known in ((make_vae(**SHAPES), "24x24, 16x40, 40x16"), (make_vae(), "16x16")):
        with pytest.raises(ValueError, match=rf"frames of {known} \(height x width\), got 16x24"):
            model.encode(torch.zeros(1, 1, 3, 16, 24))
        with pytest.raises(ValueError, match="got 16x24"):
            model.decode(latents(1), shape=Resolution(16, 24))
