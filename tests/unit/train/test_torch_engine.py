"""ardiff.train.engine: an update is whole or it is not made, and a saved engine goes on to the last bit."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ardiff.errors import CheckpointError
from ardiff.train.checkpoint import write_tensors
from ardiff.train.config import OptimizerConfig
from ardiff.train.engines.base import ema_model
from ardiff.train.engines.torch_engine import TorchEngine
from ardiff.train.shards import GROUPS, ShardReader

CPU = torch.device("cpu")


def make_engine(model: nn.Module, name: str = "adamw", **settings: Any) -> TorchEngine:
    optimizer = OptimizerConfig(name=name, lr=1e-2, muon_lr=1e-2, weight_decay=0.1)  # type: ignore[arg-type]
    return TorchEngine(model, optimizer, CPU, **settings)


def update(engine: TorchEngine, step: int, factor: float = 1.0) -> float:
    generator = torch.Generator().manual_seed(step)
    latents = torch.randn(2, 3, 2, 4, generator=generator)
    timesteps = torch.randint(1000, (2, 3), generator=generator)
    engine.backward((engine.model(latents, timesteps, torch.tensor([0, 1])) - latents).square().mean())
    return engine.step(step, factor)


def content(engine: TorchEngine) -> dict[str, torch.Tensor]:
    """Copies of everything that an update may change."""
    found = {f"weight {n}": p.detach().clone() for n, p in engine.model.named_parameters()}
    found |= {f"average {n}": a.clone() for n, a in engine.ema.weights.items()}
    for i, optimizer in enumerate(engine.optimizers):
        for j, state in optimizer.state_dict()["state"].items():
            found |= {f"optimizer {i} {j} {key}": torch.as_tensor(value).clone() for key, value in state.items()}
    return found


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_restored_engine_continues_exactly(make_dit, tmp_path: Path, name: str) -> None:
    engine = make_engine(make_dit().train(), name)
    for step in range(3):
        update(engine, step)
    write_tensors(tmp_path, engine)
    other = make_engine(make_dit(seed=9).train(), name)
    update(other, 0)
    other.restore(ShardReader(tmp_path))
    assert_same(content(engine), content(other))
    for step in range(3, 6):
        assert update(engine, step, 0.5) == update(other, step, 0.5)
    assert_same(content(engine), content(other))


def test_saving_changes_nothing_and_unpickles_nothing(make_dit, tmp_path: Path) -> None:
    engine = make_engine(make_dit())
    update(engine, 0)
    before = content(engine)
    write_tensors(tmp_path, engine)
    assert_same(before, content(engine))
    assert {p.name for p in tmp_path.iterdir()} == {f"{part}-0-of-1.safetensors" for part in GROUPS}


def test_weights_of_another_size_are_an_error(make_dit, tmp_path: Path) -> None:
    write_tensors(tmp_path, make_engine(make_dit()))
    with pytest.raises(CheckpointError, match="of another model"):
        make_engine(make_dit(width=32)).restore(ShardReader(tmp_path))


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(make_dit, name: str, value: float) -> None:
    engine = make_engine(make_dit().train(), name)
    update(engine, 0)
    before, rates = content(engine), [g["lr"] for o in engine.optimizers for g in o.param_groups]
    for parameter in engine.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    engine.model.token_in.weight.grad[1, 2] = value
    norm = engine.step(1, 0.1)
    assert norm != norm or norm == float("inf")
    assert_same(before, content(engine))
    assert rates == [g["lr"] for o in engine.optimizers for g in o.param_groups]
    assert all(p.grad is None for p in engine.model.parameters())
    engine_without = make_engine(make_dit().train(), name)
    update(engine_without, 0)
    update(engine, 1)
    update(engine_without, 1)
    assert_same(content(engine), content(engine_without))


def test_the_norm_is_before_clipping_and_the_update_after() -> None:
    """With plain gradient descent as the optimizer."""
    model = nn.Linear(2, 1, bias=False)
    model.weight.data.zero_()
    engine = TorchEngine(model, OptimizerConfig(lr=1.0), CPU, max_grad_norm=1.0)
    engine.optimizers = [torch.optim.SGD(model.parameters(), lr=1.0)]
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert engine.step(0, 0.5) == pytest.approx(5.0)
    assert model.weight.tolist()[0] == pytest.approx([-0.3, -0.4], rel=1e-5)
    model.weight.grad = torch.tensor([[0.3, 0.4]])  # below the limit: not scaled
    assert engine.step(1, 1.0) == pytest.approx(0.5)
    assert model.weight.tolist()[0] == pytest.approx([-0.6, -0.8], rel=1e-5)


def test_learning_rates_are_factors_of_the_configured_ones(make_dit) -> None:
    engine = make_engine(make_dit(), "muon")
    for step, factor in enumerate([0.5, 0.5, 0.1]):
        update(engine, step, factor)
        assert [g["lr"] for o in engine.optimizers for g in o.param_groups] == pytest.approx([1e-2 * factor] * 2)


def test_gradients_accumulate_until_the_step() -> None:
    model = nn.Linear(1, 1, bias=False)
    engine = TorchEngine(model, OptimizerConfig(), CPU, max_grad_norm=100.0)
    for _ in range(3):
        engine.backward(model(torch.ones(1, 1)).sum())
    assert engine.step(0, 1.0) == pytest.approx(3.0)
    assert model.weight.grad is None


def test_precision(make_dit) -> None:
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        engine = make_engine(make_dit(), precision=precision)
        assert engine.compute(lambda engine=engine: engine.model.token_in(torch.ones(1, 4))).dtype == dtype
        assert {p.dtype for p in engine.model.parameters()} == {torch.float32}


def test_ema_weights_are_what_a_model_can_load(make_dit) -> None:
    engine = make_engine(make_dit())
    start = copy.deepcopy(engine.ema_weights())
    update(engine, 0)
    averaged = engine.ema_weights()
    assert set(averaged) == {n for n, _ in engine.model.named_parameters()}
    assert any(not torch.equal(averaged[n], start[n]) for n in start)
    make_dit().load_state_dict(averaged, strict=True)


@pytest.mark.parametrize("sizes", [{}, {"condition": "cross_attention", "condition_dim": 5}])
def test_recomputed_activations_give_the_same_update(make_dit, sizes) -> None:
    plain, again = (make_engine(make_dit(**sizes).train(), activation_checkpointing=a) for a in (False, True))
    calls = []
    again.model.blocks[0].mlp.register_forward_hook(lambda *arguments: calls.append(1))
    assert update(plain, 0) == update(again, 0)
    assert len(calls) == 2
    assert_same(content(plain), content(again))
    ema_model(again)  # a model as any other
