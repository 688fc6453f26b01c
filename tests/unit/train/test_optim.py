import math

import pytest
import torch

from ardiff.train.config import OptimizerConfig
from ardiff.train.muon import Muon, orthogonalise
from ardiff.train.optim import build_optimizers, learning_rate_factor


@pytest.mark.parametrize("kind", ["dit", "sincos dit", "vae"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_in_exactly_one_optimizer(make_dit, make_vae, kind, name):
    model = make_vae() if kind == "vae" else make_dit(positions="sincos" if "sincos" in kind else "rotary")
    optimizers = build_optimizers(model, OptimizerConfig(name=name))
    held = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters()}
    assert len(optimizers) == {"adamw": 1, "muon": 2}[name]


def test_muon_takes_the_matrices_of_blocks_only(make_dit):
    model = make_dit()
    adamw, muon = build_optimizers(model, OptimizerConfig(name="muon", lr=1e-3, muon_lr=2e-2, weight_decay=0.1))
    taken = {id(p) for p in muon.param_groups[0]["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in taken}
    assert "blocks.0.attention.qkv.weight" in names
    assert all(n.startswith("blocks.") and n.endswith(".weight") for n in names)
    assert not any(n in names for n in ("token_in.weight", "class_embedding.weight", "blocks.0.attention.qkv.bias"))
    assert (adamw.param_groups[0]["lr"], muon.param_groups[0]["lr"]) == (1e-3, 2e-2)
    assert adamw.param_groups[0]["weight_decay"] == muon.param_groups[0]["weight_decay"] == 0.1


def test_frozen_parameters_are_left_out(make_dit):
    model = make_dit()
    model.token_in.requires_grad_(False)
    held = {id(p) for o in build_optimizers(model, OptimizerConfig()) for g in o.param_groups for p in g["params"]}
    assert id(model.token_in.weight) not in held
    assert id(model.final_layer.project.weight) in held


def test_moment_decays_are_the_configured_ones(make_dit):
    (adamw,) = build_optimizers(make_dit(), OptimizerConfig(beta1=0.8, beta2=0.95))
    assert adamw.param_groups[0]["betas"] == (0.8, 0.95)


def test_constant_schedule() -> None:
    assert [learning_rate_factor(OptimizerConfig(), step, 10) for step in range(10)] == [1.0] * 10


def test_warm_up_rises_linearly_to_one() -> None:
    config = OptimizerConfig(warmup_steps=4)
    assert [learning_rate_factor(config, step, 10) for step in range(6)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]


def test_cosine_falls_to_a_hundredth() -> None:
    config = OptimizerConfig(schedule="cosine")
    values = [learning_rate_factor(config, step, 100) for step in range(101)]
    assert values[0] == 1.0
    assert values[25] == pytest.approx(0.01 + 0.99 * (0.5 + 0.5 * math.sqrt(0.5)))
    assert values[50] == pytest.approx(0.505)
    assert values[100] == pytest.approx(0.01)
    assert values[99] == pytest.approx(0.01, abs=1e-3)
    assert values == sorted(values, reverse=True)
    assert learning_rate_factor(config, 500, 100) == pytest.approx(0.01)


def test_cosine_starts_after_the_warm_up() -> None:
    config = OptimizerConfig(schedule="cosine", warmup_steps=10)
    values = [learning_rate_factor(config, step, 110) for step in range(110)]
    assert values[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert values[10] == pytest.approx(1.0)
    assert values[60] == pytest.approx(0.505)
    assert learning_rate_factor(config, 0, 5) == pytest.approx(1 / 11)  # a run shorter than its warm-up


def test_drop_has_two_constant_phases() -> None:
    config = OptimizerConfig(schedule="drop", drop_step=3, drop_factor=0.05)
    assert [learning_rate_factor(config, step, 5) for step in range(5)] == [1.0, 1.0, 1.0, 0.05, 0.05]
    paper = OptimizerConfig(schedule="drop")
    rates = [paper.lr * learning_rate_factor(paper, step, 150_000) for step in (0, 99_999, 100_000, 149_999)]
    assert rates == pytest.approx([2e-4, 2e-4, 1e-5, 1e-5])  # Sec. 4.1


def test_unknown_schedule() -> None:
    config = OptimizerConfig(schedule="step")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown schedule 'step'"):
        learning_rate_factor(config, 0, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 0.0},
        {"muon_lr": -1.0},
        {"warmup_steps": -1},
        {"weight_decay": -0.1},
        {"drop_step": -1},
        {"drop_factor": 0.0},
    ],
)
def test_impossible_settings(changes):
    with pytest.raises(ValueError, match="must"):
        OptimizerConfig(**changes)


def test_muon_is_torchs_up_to_the_rounding_of_bfloat16() -> None:
    """On matrices of several shapes, wide, tall and square, over several updates."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 24), (24, 8), (8, 8), (8, 24)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, torchs = ([torch.nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    optimizers = [
        cls(matrices, lr=0.1, weight_decay=0.1) for cls, matrices in ((Muon, ours), (torch.optim.Muon, torchs))
    ]
    for _ in range(3):
        for pair in zip(ours, torchs, strict=True):
            pair[0].grad = pair[1].grad = torch.randn(pair[0].shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    for matrix, other, first in zip(ours, torchs, start, strict=True):
        assert float((matrix - first).abs().max()) > 0.1
        assert torch.allclose(matrix, other, atol=5e-3)


def test_updates_of_muon_are_nearly_orthogonal() -> None:
    matrices = torch.randn(3, 6, 20, generator=torch.Generator().manual_seed(1))
    for x in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalise(x, (3.4445, -4.775, 2.0315), 5, 1e-7))  # (3, 6)
        assert 0.5 < float(values.min()) < float(values.max()) < 1.5
    parallel = orthogonalise(matrices, (3.4445, -4.775, 2.0315), 5, 1e-7)
    assert torch.allclose(orthogonalise(matrices[1:2], (3.4445, -4.775, 2.0315), 5, 1e-7)[0], parallel[1], atol=1e-6)


def test_muon_leaves_parameters_without_a_gradient() -> None:
    still, moving = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    moving.grad = torch.eye(4)
    Muon([still, moving], lr=0.1).step()
    assert torch.equal(still, torch.ones(4, 4))
    assert not torch.equal(moving, still)
