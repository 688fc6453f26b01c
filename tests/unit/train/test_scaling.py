"""The formulas for planning, against what is written here and against a simulation of failing machines."""

import io
import math
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ardiff.data.latents import latent_table
from ardiff.dit import DiT, DiTConfig
from ardiff.sampling.cost import frame_evaluations
from ardiff.sampling.params import SamplingParams
from ardiff.train.checkpoint import TrainState, save_checkpoint
from ardiff.train.config import OptimizerConfig
from ardiff.train.engines.torch_engine import TorchEngine
from ardiff.train.estimate.config import EstimateConfig
from ardiff.train.estimate.counts import count_step
from ardiff.train.estimate.scaling import (
    best_checkpoint_interval,
    checkpoint_bytes,
    checkpoint_requests,
    checkpoint_seconds,
    latent_bytes,
    lost_share,
    read_rate,
    time_between_failures,
)
from ardiff.train.estimate.zero import estimate_stages, exchanged_bytes

DOCS = Path(__file__).parents[3] / "docs" / "scaling.md"


def test_bytes_of_latents() -> None:
    latents = np.random.default_rng(0).normal(size=(256, 16, 32, 4))
    file = io.BytesIO()
    pq.write_table(latent_table({"latents": latents, "label": np.zeros(256, dtype=np.int64)}), file)
    assert 1.0 < len(file.getvalue()) / (256 * latent_bytes(16, 32, 4)) < 1.34


def test_bytes_of_a_checkpoint(tmp_path: Path) -> None:
    model = DiT(DiTConfig(num_frames=4, num_tokens=4, token_dim=4, width=128, depth=4, num_heads=4))
    engine = TorchEngine(model, OptimizerConfig(), torch.device("cpu"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    engine.step(0, 1.0)
    save_checkpoint(tmp_path, engine, TrainState(1, 1, ""))
    written = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    parameters = sum(p.numel() for p in model.parameters())
    assert written == pytest.approx(checkpoint_bytes(parameters), rel=0.02)
    assert checkpoint_seconds(parameters, 2, 1e6) == pytest.approx(checkpoint_bytes(parameters) / 2e6)


def work_through(interval: float, seconds: float, between: float, restart: float, failures: int) -> float:
    """The share of lost time in a simulated run, where a failure loses the work since the last checkpoint."""
    generator = np.random.default_rng(0)
    clock = done = 0.0
    for life in generator.exponential(between, failures):
        periods = math.floor(max(life - restart, 0.0) / (interval + seconds))
        clock, done = clock + life, done + periods * interval
    return 1 - done / clock


def test_lost_time_and_the_best_interval_agree_with_a_simulation() -> None:
    seconds, between, restart = 20.0, 20_000.0, 120.0
    best = best_checkpoint_interval(seconds, between)
    for interval in (best / 2, best, 2 * best):
        simulated = work_through(interval, seconds, between, restart, 20_000)
        assert lost_share(interval, seconds, between, restart) == pytest.approx(simulated, rel=0.08)
    around = {factor: work_through(best * factor, seconds, between, restart, 20_000) for factor in (0.4, 1.0, 2.5)}
    assert min(around, key=lambda factor: around[factor]) == 1.0


def plan(num_gpus: int) -> list[float]:
    """A column of the table in docs/scaling.md: the AR-DiT of the paper's sizes, batches of 1024 clips."""
    share = 1024 // num_gpus
    micro = min(share, 16)
    config = EstimateConfig(
        micro_batch_size=micro,
        gradient_accumulation=share // micro,
        num_gpus=num_gpus,
        bandwidth_gb=200.0 if num_gpus == 8 else 6.25,
    )
    parameters, stages = count_step(config).parameters, estimate_stages(config)
    seconds = stages[1].compute_seconds + stages[1].exchange_seconds
    sent = [
        exchanged_bytes(parameters, stage, num_gpus, "bf16", config.gradient_accumulation) / 1e9 for stage in range(4)
    ]
    stored = checkpoint_seconds(parameters, num_gpus, 0.2e9)
    between = time_between_failures(num_gpus // 8, 1000)
    interval = best_checkpoint_interval(stored, between)
    frame = count_step(config).flops / micro / 16
    return [
        stages[1].compute_seconds,
        *sent,
        stages[1].exchange_seconds,
        150_000 * seconds / 3600,
        read_rate(1 / seconds, 1024, latent_bytes(16, 32, 4)) / 1e6,
        checkpoint_bytes(parameters) / 1e9,
        stored,
        checkpoint_requests(parameters, num_gpus),
        between / 3600,
        interval / 60,
        100 * lost_share(interval, stored, between, 300.0),
        num_gpus * 0.4 * 312e12 / (frame * frame_evaluations(SamplingParams(num_inference_steps=50, ar_step=5), 16)),
    ]


def test_the_documented_plan_is_what_the_formulas_give() -> None:
    [table] = re.findall(r"\| AR-DiT \| 8 \| 64 \| 512 \|\n\|.*\n((?:\|.*\n)+)", DOCS.read_text())
    rows = [[float(cell.replace(",", "")) for cell in line.split("|")[2:5]] for line in table.splitlines()]
    expected = list(zip(*(plan(gpus) for gpus in (8, 64, 512)), strict=True))
    assert len(rows) == len(expected)
    for row, values in zip(rows, expected, strict=True):
        assert row == [pytest.approx(value, rel=0.06, abs=0.005) for value in values]
