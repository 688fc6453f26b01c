"""Estimates against measured small models and against formulas by hand."""

import dataclasses

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ardiff.cli import main
from ardiff.dit import DiT, DiTConfig
from ardiff.train.engine import TorchEngine
from ardiff.train.estimate import (
    EstimateConfig,
    count_forward,
    count_step,
    estimate,
    exchanged_bytes,
    recommended,
    state_bytes,
)
from ardiff.train.optim import OptimizerConfig
from ardiff.vae import ARAutoencoder, AutoencoderConfig

DIT = DiTConfig(num_frames=4, num_tokens=8, width=64, depth=5, num_heads=4)
VAE = AutoencoderConfig(resolution=32, patch_size=8, num_tokens=4, width=64, depth=4, num_heads=4, temporal_window=4)
SMALL = EstimateConfig(dit=DIT, vae=VAE, num_frames=4, micro_batch_size=8, precision="fp32")


@pytest.mark.parametrize("model", ["dit", "vae"])
def test_activations_are_those_that_the_allocator_gives_out(model: str) -> None:
    """The memory that is more after a forward pass than before, of a real model, by torch's profiler."""
    config = dataclasses.replace(SMALL, model=model)
    counts, real = count_step(config), DiT(DIT) if model == "dit" else ARAutoencoder(VAE)
    if isinstance(real, DiT):
        inputs = (torch.zeros(8, 4, 8, 4), torch.zeros(8, 4, dtype=torch.int64), torch.zeros(8, dtype=torch.int64))
    else:
        inputs = (torch.zeros(8, 4, 3, 32, 32), torch.zeros(8, 4, 4, 4))  # type: ignore[assignment]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        output = real(*inputs)
    measured = sum(event.self_cpu_memory_usage for event in record.key_averages())
    assert output is not None
    assert counts.activations == pytest.approx(measured, rel=0.1)
    assert counts.parameters == sum(p.numel() for p in real.parameters())


@pytest.mark.parametrize("model", ["dit", "vae"])
def test_counts_are_linear_in_depth(model: str) -> None:
    config = dataclasses.replace(SMALL, model=model)
    flops, kept = count_forward(DiT(DIT) if model == "dit" else ARAutoencoder(VAE), 8, 4)
    counts = count_step(config)
    assert (counts.flops, counts.activations) == (flops, kept)


def test_operations_of_the_dit_by_hand() -> None:
    width, frames, tokens = 64, 8 * 4, 8
    rows = frames * tokens
    linear = rows * (4 * width**2 + 2 * 4 * width**2) + frames * 6 * width**2
    attention = 8 * 2 * (4 * tokens) ** 2 * width
    rest = 2 * rows * 4 * width + frames * (256 * width + width**2 + 2 * width**2)
    assert count_step(SMALL).flops == 2 * (5 * (linear + attention) + rest)


def test_states_are_those_that_the_plain_engine_holds() -> None:
    engine = TorchEngine(DiT(DIT), OptimizerConfig(), torch.device("cpu"))
    for parameter in engine.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    held = sum(2 * p.nbytes for p in engine.model.parameters())
    engine.step(0, 1.0)
    held += sum(t.nbytes for part, name, t in engine.tensors() if part == "ema" or name.startswith("exp_avg"))
    parameters = sum(p.numel() for p in engine.model.parameters())
    assert state_bytes(parameters, 0, 8, "fp32") == held == 20 * parameters


def test_what_each_stage_shares_out() -> None:
    assert [state_bytes(100, stage, 4, "bf16") for stage in range(4)] == [2000, 800, 650, 500]
    assert [state_bytes(100, stage, 1, "fp32") for stage in range(4)] == [2000, 2400, 2400, 2400]
    assert [exchanged_bytes(100, stage, 4, "bf16", 8) for stage in range(4)] == [600, 450, 2550, 3600]
    assert exchanged_bytes(100, 3, 1, "bf16", 8) == 0
    for function in (state_bytes, exchanged_bytes):
        with pytest.raises(ValueError, match="no ZeRO stage 4"):
            function(100, 4, 4, "bf16", *([1] if function is exchanged_bytes else []))  # type: ignore[operator]


def test_checkpointing_trades_memory_for_time() -> None:
    kept, again = (estimate(dataclasses.replace(SMALL, activation_checkpointing=c))[1] for c in (False, True))
    assert again.activations < 0.5 * kept.activations
    assert again.compute_seconds == pytest.approx(kept.compute_seconds * 4 / 3)
    assert again.states == kept.states


def test_the_choice_is_the_fastest_that_fits() -> None:
    paper = EstimateConfig()  # small models are smaller than the bucket, and fit best without ZeRO
    stages = estimate(paper)
    chosen = [
        recommended(dataclasses.replace(paper, gpu_memory_gib=(s.memory + 1) / 0.9 / 2**30), stages) for s in stages
    ]
    assert chosen[3] == stages[3]
    assert all(c is not None and c.memory <= s.memory + 1 for c, s in zip(chosen, stages, strict=True))
    assert recommended(paper, stages) == stages[1]
    assert recommended(dataclasses.replace(paper, gpu_memory_gib=1e-9), stages) is None


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [f"dit.{name}={getattr(DIT, name)}" for name in ("num_frames", "num_tokens", "width", "depth", "num_heads")]
    assert main(["estimate", *sizes, "num_frames=4"]) == 0
    out = capsys.readouterr().out
    assert "<- choose" in out
    assert len(out.splitlines()) == 6
    assert main(["estimate", *sizes, "num_frames=4", "gpu_memory_gib=1e-9"]) == 0
    assert "No stage fits" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"num_gpus": 0}, {"utilisation": 0.0}, {"bandwidth_gb": 0.0}])
def test_impossible_settings(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        EstimateConfig(**changes)  # type: ignore[arg-type]
