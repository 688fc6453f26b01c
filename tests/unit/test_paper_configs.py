"""The benchmark configs have the paper's numbers, build models of the paper's size, and train with small models."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from ardiff.config import load_config
from ardiff.data.latents import LatentStatistics
from ardiff.dit import DiT
from ardiff.train.callbacks import TrainingCallback
from ardiff.train.checkpoint import TrainState
from ardiff.train.config import TrainConfig
from ardiff.train.engines.config import DeepSpeedConfig
from ardiff.train.engines.torch_engine import TorchEngine
from ardiff.train.loop import train
from ardiff.train.tasks import AutoencoderTask, DiTTask, Task
from ardiff.vae import ARAutoencoder
from ray_jobs.encode import EncodeConfig
from ray_jobs.generate import GenerateConfig
from ray_jobs.prepare import PrepareConfig
from ray_jobs.training.config import TrainDiTConfig, TrainVAEConfig

CONFIGS = Path(__file__).parents[2] / "configs"
BENCHMARKS = {"sky": 0, "taichi": 0, "ucf101": 101, "faceforensics": 0}
STAGES = ["train_vae_1_frames", "train_vae_2_adversarial", "train_vae_3_temporal"]


def load_vae(benchmark: str, stage: str) -> TrainVAEConfig:
    return load_config(TrainVAEConfig, [CONFIGS / benchmark / f"{stage}.yaml"])


def load_dit(benchmark: str) -> TrainDiTConfig:
    return load_config(TrainDiTConfig, [CONFIGS / benchmark / "train_dit.yaml"])


class Losses(TrainingCallback):
    """Keeps the losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step_end(self, step: int, loss: float) -> None:
        self.losses.append(loss)


def two_steps(task: Task, config: TrainConfig, batch: dict[str, torch.Tensor]) -> None:
    assert (config.num_workers, config.engine) == (8, "deepspeed")
    changes = {"num_steps": 2, "batch_size": 2 * config.gradient_accumulation, "precision": "fp32", "sample_every": 0}
    alone = {"num_workers": 1, "engine": "torch", "deepspeed": DeepSpeedConfig()}
    config = dataclasses.replace(config, **changes, **alone)  # type: ignore[arg-type]
    device, recorder = torch.device("cpu"), Losses()
    before = [p.detach().clone() for p in task.model.parameters()]
    engine, discriminator = (
        m and TorchEngine(m, config.optimizer, device, config.precision, config.max_grad_norm, config.ema_decay)
        for m in (task.model, task.discriminator)
    )
    batches = iter([batch] * 2 * config.gradient_accumulation)
    assert isinstance(engine, TorchEngine)
    train(task, engine, batches, config, TrainState(0, 0, ""), [recorder], discriminator=discriminator)
    assert len(recorder.losses) == 2
    assert any(not torch.equal(p, b) for p, b in zip(task.model.parameters(), before, strict=True))


def test_benchmarks_train_alike() -> None:
    """They differ in their files, and the DiT of UCF-101 in its classes. So the tests below train those of one."""
    for benchmark, num_classes in BENCHMARKS.items():
        for stage in STAGES:
            vae, sky = load_vae(benchmark, stage), load_vae("sky", stage)
            clips = dataclasses.replace(vae.clips, manifest=sky.clips.manifest)
            assert dataclasses.replace(vae, output=sky.output, init_from=sky.init_from, clips=clips) == sky
        dit, sky_dit = load_dit(benchmark), load_dit("sky")
        assert dit.dit == dataclasses.replace(sky_dit.dit, num_classes=num_classes)
        task = dataclasses.replace(sky_dit.task, class_dropout=0.1) if num_classes else sky_dit.task
        assert (dit.task, dit.diffusion, dit.train) == (task, sky_dit.diffusion, sky_dit.train)


@pytest.mark.parametrize("stage", STAGES)
def test_vae_stages(stage: str) -> None:
    config = load_vae("sky", stage)
    with torch.device("meta"):
        model = ARAutoencoder(config.vae)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(708.1e6, rel=1e-3)
    sizes: dict[str, Any] = {
        "resolution": 16,
        "patch_size": 8,
        "num_tokens": 2,
        "width": 16,
        "depth": 1,
        "num_heads": 2,
    }
    discriminator = dataclasses.replace(config.task.discriminator, width=4, depth=1)
    small = AutoencoderTask(
        ARAutoencoder(dataclasses.replace(config.vae, **sizes)),
        dataclasses.replace(config.task, discriminator=discriminator),
    )
    video = torch.randint(0, 256, (2, config.clips.num_frames, 16, 16, 3), dtype=torch.uint8)
    two_steps(small, config.train, {"video": video})


@pytest.mark.parametrize("benchmark", ["sky", "ucf101"])
def test_dit(benchmark: str) -> None:
    config = load_dit(benchmark)
    assert config.dit.num_classes == BENCHMARKS[benchmark]
    with torch.device("meta"):
        model = DiT(config.dit)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(673.7e6, rel=1e-3)
    small = DiT(dataclasses.replace(config.dit, width=16, depth=2, num_heads=2, num_tokens=2))
    statistics = LatentStatistics([[0.0] * 4] * 2, 1.0)
    task = DiTTask(small, config.task, config.diffusion, statistics)
    two_steps(task, config.train, {"latents": torch.randn(2, 16, 2, 4), "label": torch.tensor([0, 1])})


def test_the_numbers_of_the_paper() -> None:
    """Sec. 4.1 and Table 6 (whose beta end is a misprint)."""
    for benchmark in BENCHMARKS:
        dit, stages = load_dit(benchmark), [load_vae(benchmark, stage) for stage in STAGES]
        assert [s.train.num_steps for s in stages] == [50_000, 450_000, 100_000]
        assert [s.clips.num_frames for s in stages] == [1, 1, 16]
        assert [bool(s.task.adversarial_weight) for s in stages] == [False, True, True]
        assert [s.task.temporal_from_step < s.train.num_steps for s in stages] == [False, False, True]
        for stage in stages:
            assert (stage.train.batch_size, stage.train.optimizer.lr) == (16 * 8, 1e-4)
            vae = stage.vae
            assert (vae.num_tokens, vae.token_dim, vae.width, vae.depth) == (32, 4, 1024, 24)
            assert (vae.num_heads, vae.mlp_ratio, vae.resolution) == (16, 4.0, (256, 256))
        assert (dit.dit.width, dit.dit.depth, dit.dit.num_heads, dit.dit.num_frames) == (1152, 28, 16, 16)
        optimizer, diffusion = dit.train.optimizer, dit.diffusion
        assert (optimizer.lr, optimizer.schedule, optimizer.drop_step) == (2e-4, "drop", 100_000)
        assert optimizer.lr * optimizer.drop_factor == pytest.approx(1e-5)
        assert (dit.train.num_steps, dit.train.batch_size) == (150_000, 16 * 8 * 8)
        assert (diffusion.num_timesteps, diffusion.beta_start, diffusion.beta_end) == (1000, 1e-4, 0.02)
        assert (diffusion.prediction, diffusion.timestep_sampling, dit.task.noise_clip > 0) == ("x0", "fopp", True)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_each_stage_reads_what_the_one_before_writes(benchmark: str) -> None:
    first, second, third = (load_vae(benchmark, stage) for stage in STAGES)
    folder = CONFIGS / benchmark
    prepare = load_config(PrepareConfig, [folder / "prepare.yaml"])
    encode = load_config(EncodeConfig, [folder / "encode.yaml"])
    dit, generate = load_dit(benchmark), load_config(GenerateConfig, [folder / "generate.yaml"])
    assert {s.clips.manifest for s in (first, second, third)} == {prepare.manifest} == {encode.manifest}
    assert (first.init_from, second.init_from, third.init_from) == ("", first.model, second.model)
    assert (encode.vae, dit.latents, generate.pipeline) == (third.model, encode.output, dit.pipeline)
    assert (third.vae.num_tokens, third.vae.token_dim) == (dit.dit.num_tokens, dit.dit.token_dim)
    assert first.vae == second.vae == third.vae
    assert encode.num_frames == dit.dit.num_frames == third.clips.num_frames
