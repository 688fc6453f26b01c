"""Adversarial losses and the discriminator."""

import pytest
import torch
from torch import nn

from ardiff.vae.config import DiscriminatorConfig
from ardiff.vae.discriminator import PatchDiscriminator
from ardiff.vae.losses import adaptive_weight, hinge_discriminator_loss, hinge_generator_loss, recorded


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_hinge_loss_is_zero_beyond_the_margin() -> None:
    assert float(hinge_discriminator_loss(torch.tensor([1.0, 5.0]), torch.tensor([-1.0, -9.0]))) == 0.0
    assert float(hinge_discriminator_loss(torch.tensor([0.0]), torch.tensor([0.0]))) == 1.0
    assert float(hinge_discriminator_loss(torch.tensor([-1.0]), torch.tensor([3.0]))) == 0.5 * (2 + 4)
    assert float(hinge_generator_loss(torch.tensor([1.0, 3.0]))) == -2.0


def test_the_adaptive_weight_is_the_ratio_of_the_gradients_of_the_last_weight() -> None:
    first, last, discriminator = nn.Linear(5, 4), nn.Linear(4, 6), nn.Linear(6, 1)
    for i, parameter in enumerate([*first.parameters(), *last.parameters(), *discriminator.parameters()]):
        parameter.data = normal(*parameter.shape, seed=i)
    with recorded(last) as record:
        output = last(first(normal(3, 7, 5, seed=20)))
    reconstruction, adversarial = (output - 1).square().mean(), -discriminator(output).mean()
    norms = [torch.autograd.grad(x, last.weight, retain_graph=True)[0].norm() for x in (reconstruction, adversarial)]
    weight = adaptive_weight(reconstruction, adversarial, record)
    assert float(weight) == pytest.approx(float(norms[0] / (norms[1] + 1e-4)), rel=1e-5)
    assert not weight.requires_grad
    assert all(p.grad is None for module in (first, last, discriminator) for p in module.parameters())
    assert float(adaptive_weight(reconstruction, adversarial, record, limit=0.01)) == pytest.approx(0.01)


def test_the_adaptive_weight_of_a_convolution() -> None:
    first, last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
    with recorded(last) as record:
        output = last(first(normal(2, 3, 6, 5)))
    reconstruction, adversarial = (output - 1).square().mean(), -(output**3).mean()
    norms = [torch.autograd.grad(x, last.weight, retain_graph=True)[0].norm() for x in (reconstruction, adversarial)]
    expected = pytest.approx(float(norms[0] / (norms[1] + 1e-4)), rel=1e-4)
    assert float(adaptive_weight(reconstruction, adversarial, record)) == expected


@pytest.mark.parametrize("steepness", [1e-5, 1.0, 1e6])
def test_the_adaptive_weight_keeps_small_and_large_gradients_in_fp16(steepness: float) -> None:
    """The frames are almost right, so the gradient of the mean over their pixels underflows in fp16."""
    last = nn.Linear(8, 48)
    last.weight.data, last.bias.data = normal(48, 8), normal(48, seed=1)
    inputs, error = normal(8, 64, 8, seed=2), 1e-3 * normal(8, 64, 48, seed=3)
    weights = []
    for dtype in (torch.float16, torch.float32):
        with torch.autocast("cpu", dtype=torch.float16, enabled=dtype == torch.float16), recorded(last) as record:
            output = last(inputs)
            assert output.dtype == dtype
            reconstruction = (output.float() - (output.detach().float() - error)).square().mean()
            adversarial = -steepness * (output * output.detach()).float().mean()
            weights.append(float(adaptive_weight(reconstruction, adversarial, record)))
    assert weights[0] == pytest.approx(weights[1], rel=0.01)
    assert 0 < weights[1] < 1e4


def test_recording_ends_with_its_context() -> None:
    layer = nn.Linear(2, 2)
    with recorded(layer) as record:
        layer(torch.ones(1, 1, 2))
    layer(torch.zeros(1, 1, 2))
    assert bool((record.input == 1).all())


@pytest.mark.parametrize(("depth", "size"), [(1, 16), (2, 32), (3, 32)])
def test_the_discriminator_scores_patches(depth: int, size: int) -> None:
    model = PatchDiscriminator(DiscriminatorConfig(width=8, depth=depth))
    frames = normal(3, 3, size, size)
    scores = model(frames)
    side = size // 2**depth - 2
    assert scores.shape == (3, 1, side, side)
    assert torch.allclose(model(frames[1:2]), scores[1:2], atol=1e-5), "a frame's score depends on no other frame"
    assert not list(model.buffers()), "a checkpoint holds parameters only"


def test_the_discriminator_learns() -> None:
    model = PatchDiscriminator(DiscriminatorConfig(width=4, depth=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    real, fake = normal(8, 3, 8, 8), normal(8, 3, 8, 8, seed=1) * 0.2
    for _ in range(60):
        loss = hinge_discriminator_loss(model(real), model(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.3


@pytest.mark.parametrize("settings", [{"width": 0}, {"depth": 0}])
def test_impossible_sizes(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        DiscriminatorConfig(**settings)
