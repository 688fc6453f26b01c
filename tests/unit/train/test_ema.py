import pytest
import torch
from torch import nn

from ardiff.train.ema import EMA


def test_the_ema_follows_the_rising_decay() -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.data.fill_(1.0)
    ema, expected = EMA(model, 0.5), 1.0
    for step, value in enumerate([2.0, -1.0, 4.0, 0.0] + [3.0] * 12):
        model.weight.data.fill_(value)
        ema.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        assert ema.weights["weight"].flatten().tolist() == pytest.approx([expected] * 2, rel=1e-6)


def test_the_ema_is_a_float32_copy_of_the_weights() -> None:
    model = nn.Linear(3, 2).bfloat16()
    ema = EMA(model, 0.9)
    before = {name: a.clone() for name, a in ema.weights.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert set(before) == {"weight", "bias"}
    for name, average in ema.weights.items():
        assert average.dtype == torch.float32
        assert not average.requires_grad
        assert torch.equal(average, before[name])


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_impossible_decay(decay: float) -> None:
    with pytest.raises(ValueError, match="decay"):
        EMA(nn.Linear(1, 1), decay)
