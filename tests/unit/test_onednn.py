import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ardiff import onednn
from ardiff.dit import DiT, DiTConfig
from ardiff.train.config import TrainConfig
from ardiff.train.engines.factory import make_engine

CPU = torch.device("cpu")


def model_and_batch() -> tuple[DiT, tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(0)
    model = DiT(DiTConfig(num_frames=4, num_tokens=3, token_dim=4, width=32, depth=2, num_heads=4, num_classes=3))
    for parameter in model.parameters():  # adaLN-zero would hide the blocks
        nn.init.normal_(parameter, std=0.1)
    return model, (torch.randn(5, 4, 3, 4), torch.randint(1000, (5, 4)), torch.arange(5) % 4)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    result: Tensor = model(*batch).square().mean()
    return result


@pytest.mark.skipif(not onednn.available(), reason="this torch is built without oneDNN")
def test_loss_and_gradients_are_equal_up_to_rounding() -> None:
    plain, batch = model_and_batch()
    fast = copy.deepcopy(plain)
    onednn.accelerate_linear(fast)
    for model in (plain, fast):
        loss_of(model, batch).backward()
    torch.testing.assert_close(loss_of(fast, batch), loss_of(plain, batch), rtol=1e-5, atol=1e-6)
    for (name, a), (_, b) in zip(plain.named_parameters(), fast.named_parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert float((a.grad - b.grad).abs().max()) <= 1e-5 * float(a.grad.abs().max()) + 1e-8, name


@pytest.mark.skipif(not onednn.available(), reason="this torch is built without oneDNN")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 16), (2, 3, 16), (2, 3, 5, 16)])
def test_any_number_of_axes_with_and_without_bias(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(1)
    layer, x = nn.Linear(16, 24, bias=bias), torch.randn(shape)
    expected = layer(x)
    onednn.accelerate_linear(layer)
    assert not torch.equal(layer(x), torch.zeros_like(expected))
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert layer(x).shape == expected.shape


def test_other_types_and_autocast_do_not_use_onednn() -> None:
    torch.manual_seed(2)
    layer, x = nn.Linear(16, 24), torch.randn(3, 16)
    wide = copy.deepcopy(layer).double()
    expected = [layer(x).to(torch.bfloat16), wide(x.double())]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected[0] = layer(x)
    for module in (layer, wide):
        onednn.accelerate_linear(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), expected[0])
    assert torch.equal(wide(x.double()), expected[1])


@pytest.mark.skipif(not onednn.available(), reason="this torch is built without oneDNN")
def test_a_packed_autoencoder_is_equal_up_to_rounding(make_vae: Callable[..., Any]) -> None:
    plain, video = make_vae(), torch.rand(3, 8, 3, 16, 16)
    packed = copy.deepcopy(plain)
    assert onednn.packable(packed)
    onednn.pack_linear(packed)
    assert any(isinstance(module, onednn.PackedLinear) for module in packed.modules())
    with torch.no_grad():
        latents = plain.latents(video)
        torch.testing.assert_close(packed.latents(video), latents, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(packed.decode(latents), plain.decode(latents), rtol=1e-4, atol=1e-5)


def test_training_is_reproducible_and_does_not_change_the_evaluation_model() -> None:
    config = TrainConfig(num_steps=4, batch_size=5, linear="onednn")
    weights = []
    for _ in range(2):
        model, batch = model_and_batch()
        engine = make_engine(model, config, CPU)
        for step in range(4):
            engine.backward(loss_of(engine.model, batch))
            engine.step(step, 1.0)
        weights.append(engine.ema_weights())
        assert all("forward" not in vars(m) for m in engine.skeleton.modules())
    accelerated = [m for m in engine.model.modules() if isinstance(m, nn.Linear) and "forward" in vars(m)]
    assert bool(accelerated) == onednn.available()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_deepspeed_is_refused() -> None:
    with pytest.raises(ValueError, match="linear=onednn needs engine=torch"):
        TrainConfig(engine="deepspeed", linear="onednn")
