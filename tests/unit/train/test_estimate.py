"""Estimates against measured small models and against formulas by hand."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ardiff.cli import main
from ardiff.dit import DiT, DiTConfig
from ardiff.sampling.params import SamplingParams
from ardiff.train.config import OptimizerConfig
from ardiff.train.engines.torch_engine import TorchEngine
from ardiff.train.estimate.command import estimate_jobs
from ardiff.train.estimate.config import EstimateConfig, WorkConfig
from ardiff.train.estimate.counts import (
    count_forward,
    count_step,
    decoder_flops,
    encoder_flops,
    frame_flops,
    i3d_flops,
    video_flops,
)
from ardiff.train.estimate.zero import estimate_stages, exchanged_bytes, recommended, state_bytes
from ardiff.train.tasks import DistillTaskConfig
from ardiff.train.tasks.distill import evaluations_of_update
from ardiff.vae import ARAutoencoder, AutoencoderConfig

ROOT = Path(__file__).parents[3]
DIT = DiTConfig(num_frames=4, num_tokens=8, width=64, depth=5, num_heads=4)
VAE = AutoencoderConfig(resolution=32, patch_size=8, num_tokens=4, width=64, depth=4, num_heads=4, temporal_window=4)
SMALL = EstimateConfig(dit=DIT, vae=VAE, num_frames=4, micro_batch_size=8, precision="fp32")


@pytest.mark.parametrize("model", ["dit", "vae"])
def test_activations_are_what_the_allocator_allocates(model: str) -> None:
    """The increase of memory in a forward pass of a real model, from torch's profiler."""
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


def test_rectangles_have_as_many_patches_as_squares_of_their_area() -> None:
    """Operations depend on the number of patches only."""
    counts = {}
    for shape in ((32, 32), (16, 64), (64, 16), (16, 32)):
        config = dataclasses.replace(SMALL, model="vae", vae=dataclasses.replace(VAE, resolution=shape))
        counts[shape] = count_step(config), encoder_flops(config.vae), decoder_flops(config.vae)
    assert counts[32, 32] == counts[16, 64] == counts[64, 16]
    assert counts[16, 32][0].flops < 0.7 * counts[32, 32][0].flops
    assert counts[16, 32][0].block_input == counts[32, 32][0].block_input * 12 / 20


def test_operations_of_the_dit_by_hand() -> None:
    width, frames, tokens = 64, 8 * 4, 8
    rows = frames * tokens
    linear = rows * (4 * width**2 + 2 * 4 * width**2) + frames * 6 * width**2
    attention = 8 * 2 * (4 * tokens) ** 2 * width
    rest = 2 * rows * 4 * width + frames * (256 * width + width**2 + 2 * width**2)
    assert count_step(SMALL).flops == 2 * (5 * (linear + attention) + rest)


def test_operations_of_the_text_by_hand() -> None:
    """Keys and values of 8 prompts and of no text, queries, attention and output; a video computes them once."""
    text = dataclasses.replace(DIT, condition="cross_attention", condition_dim=48)
    config = dataclasses.replace(SMALL, dit=text)
    rows, width = 8 * 4 * 8, 64
    embedding = (8 * 77 + 1) * (48 * width + width**2)
    of_blocks = rows * 2 * width**2 + (8 * 77 + 1) * 2 * width**2 + 2 * rows * 77 * width
    assert count_step(config).flops - count_step(SMALL).flops == 2 * (embedding + 5 * of_blocks)
    assert count_step(config).parameters == sum(p.numel() for p in DiT(text).parameters())
    prompt = 2 * 77 * (48 * width + width**2 + 5 * 2 * width**2)
    work = WorkConfig(sampling=SamplingParams(num_frames=4, num_inference_steps=7, ar_step=0, mode="full"))
    frame = (count_step(config).flops / 8 - prompt) / 4
    expected = 28 * frame + prompt + 4 * decoder_flops(VAE)
    assert video_flops(dataclasses.replace(config, work=work)) == pytest.approx(expected)


def test_states_are_what_the_torch_engine_holds() -> None:
    engine = TorchEngine(DiT(DIT), OptimizerConfig(), torch.device("cpu"))
    for parameter in engine.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    held = sum(2 * p.nbytes for p in engine.model.parameters())
    engine.step(0, 1.0)
    held += sum(t.nbytes for part, name, t in engine.tensors() if part == "ema" or name.startswith("exp_avg"))
    parameters = sum(p.numel() for p in engine.model.parameters())
    assert state_bytes(parameters, 0, 8, "fp32") == held == 20 * parameters


def test_what_each_stage_shards() -> None:
    assert [state_bytes(100, stage, 4, "bf16") for stage in range(4)] == [2000, 800, 650, 500]
    assert [state_bytes(100, stage, 1, "fp32") for stage in range(4)] == [2000, 2400, 2400, 2400]
    assert [exchanged_bytes(100, stage, 4, "bf16", 8) for stage in range(4)] == [600, 450, 2550, 3600]
    assert exchanged_bytes(100, 3, 1, "bf16", 8) == 0
    for function in (state_bytes, exchanged_bytes):
        with pytest.raises(ValueError, match="no ZeRO stage 4"):
            function(100, 4, 4, "bf16", *([1] if function is exchanged_bytes else []))  # type: ignore[operator]


def test_checkpointing_trades_memory_for_time() -> None:
    kept, again = (estimate_stages(dataclasses.replace(SMALL, activation_checkpointing=c))[1] for c in (False, True))
    assert again.activations < 0.5 * kept.activations
    assert again.compute_seconds == pytest.approx(kept.compute_seconds * 4 / 3)
    assert again.states == kept.states


def test_the_choice_is_the_fastest_that_fits() -> None:
    paper = EstimateConfig()  # small models are smaller than the bucket, and fit best without ZeRO
    stages = estimate_stages(paper)
    chosen = [
        recommended(dataclasses.replace(paper, gpu_memory_gib=(s.memory + 1) / 0.9 / 2**30), stages) for s in stages
    ]
    assert chosen[3] == stages[3]
    assert all(c is not None and c.memory <= s.memory + 1 for c, s in zip(chosen, stages, strict=True))
    assert recommended(paper, stages) == stages[1]
    assert recommended(dataclasses.replace(paper, gpu_memory_gib=1e-9), stages) is None


def test_a_generated_video_is_evaluations_of_frames_and_their_decoding() -> None:
    """Against whole forward passes: both halves of the AR-VAE, and the AR-DiT per frame."""
    of_the_dit, _ = count_forward(DiT(DIT), 1, 4)
    of_the_vae, _ = count_forward(ARAutoencoder(VAE), 1, 4)
    assert 4 * (encoder_flops(VAE) + decoder_flops(VAE)) == of_the_vae
    for frames, steps, ar_step, evaluations in ((4, 10, 3, 4 * 10 + 3), (1, 7, 0, 7)):
        params = SamplingParams(num_frames=frames, num_inference_steps=steps, ar_step=ar_step)
        plain, guided = (
            video_flops(dataclasses.replace(SMALL, work=WorkConfig(sampling=dataclasses.replace(params, **changes))))
            for changes in ({}, {"guidance_scale": 2.0})
        )
        assert guided - plain == pytest.approx(evaluations * of_the_dit / 4)
        assert plain - (guided - plain) == pytest.approx(frames * decoder_flops(VAE))


def test_operations_of_i3d_are_the_published_ones() -> None:
    """108 G multiplications and additions for 64 frames (Carreira and Zisserman's network at 224 x 224)."""
    assert i3d_flops() == pytest.approx(2 * 108e9 / 4, rel=0.05)


def test_gpu_hours_of_the_jobs_by_hand() -> None:
    work = WorkConfig(
        num_updates=1000,
        num_clips=50,
        num_videos=20,
        sampling=SamplingParams(num_frames=4),
        num_scored=30,
        replicas=3,
        endpoint_hours=7,
    )
    config = dataclasses.replace(SMALL, work=work, num_gpus=2, peak_tflops=1e-6, utilisation=0.5, gpu_memory_gib=100)
    rate = 0.5e6
    found = {job.name: job for job in estimate_jobs(config)}
    stage = recommended(config, estimate_stages(config))
    assert stage is not None
    update = stage.compute_seconds + stage.exchange_seconds
    assert stage.compute_seconds == 3 * count_step(config).flops * 8 / rate
    assert found["train-dit"].gpu_hours == pytest.approx(2 * 1000 * update / 3600)
    assert found["encode"].gpu_hours == pytest.approx(50 * 4 * encoder_flops(VAE) / rate / 3600)
    assert found["sweep"].gpu_hours == pytest.approx(20 * video_flops(config) / rate / 3600)
    assert found["evaluate"].gpu_hours == pytest.approx(30 * i3d_flops() / (0.5 * 19.5e12) / 3600)
    assert found["endpoint"].gpu_hours == 21
    assert [job.name for job in estimate_jobs(dataclasses.replace(config, model="vae"))] == ["train-vae"]
    assert "train-dit" not in {job.name for job in estimate_jobs(dataclasses.replace(config, gpu_memory_gib=1e-9))}


def test_gpu_hours_of_a_student_by_hand() -> None:
    """Two clips of 4 frames in each of 8 micro-batches; its own videos take one unguided step."""
    recipe = DistillTaskConfig(
        teacher_steps=2, start_probabilities=(0.75, 0.25), trajectory_uses=5, guidance=2.0, first_frames=4
    )
    work = WorkConfig(distill_updates=30, num_videos=7, sampling=SamplingParams(num_frames=4))
    config = dataclasses.replace(SMALL, work=work, distill=recipe, peak_tflops=1e-6, utilisation=0.5)
    found = {job.name: job for job in estimate_jobs(config)}
    student = 4 + 4 + 4  # clean, noisy and further first frames of a clip and update
    teacher = 2 * student * (0.75 * 2 + 0.25 * 1) / 5
    assert evaluations_of_update(recipe, 4) == (teacher, student)
    clips = config.micro_batch_size * config.gradient_accumulation * config.num_gpus
    flops = 30 * clips * (teacher + 3 * student) * frame_flops(config)
    assert found["distill"].gpu_hours == pytest.approx(flops / 0.5e6 / 3600)
    assert found["sweep"].work.endswith("of 4 frames, 1 step")
    video = (4 + 3) * frame_flops(config) + 4 * decoder_flops(VAE)
    assert found["sweep"].gpu_hours == pytest.approx(7 * video / 0.5e6 / 3600)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [f"dit.{name}={getattr(DIT, name)}" for name in ("num_frames", "num_tokens", "width", "depth", "num_heads")]
    assert main(["estimate", *sizes, "num_frames=4"]) == 0
    out = capsys.readouterr().out
    assert "<- choose" in out
    assert [line.split()[0] for line in out.splitlines()[6:]] == [
        "job", "train-dit", "encode", "sweep", "evaluate", "endpoint"
    ]  # fmt: skip
    assert main(["estimate", *sizes, "num_frames=4", "gpu_memory_gib=1e-9"]) == 0
    assert "No stage fits" in capsys.readouterr().out


def test_the_documented_costs_are_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """Every block of docs/scaling.md with a command and its output, and the table of cluster/README.md."""
    shown = re.findall(r"```\n\$ ardiff (estimate.*)\n((?:.+\n)+?)```", (ROOT / "docs" / "scaling.md").read_text())
    assert shown
    for command, output in shown:
        assert main(shlex.split(command)) == 0
        assert output in capsys.readouterr().out
    runbook = (ROOT / "cluster" / "README.md").read_text()
    commands = [shlex.split(line) for line in re.findall(r"^ardiff (estimate.*)$", runbook, re.MULTILINE)]
    printed: list[str] = []
    for arguments in commands:
        assert main(arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        printed += lines[[line.split()[0] for line in lines].index("job") + 1 :]
    expected = [[float(number) for number in line.split()[-2:]] for line in printed]
    table = re.search(r"\| job \|.*\| GPU hours \| dollars \|\n\|.*\n((?:\|.*\n)+)", runbook)
    assert table is not None
    rows = [[cell.split()[0].replace(",", "") for cell in line.split("|")[-3:-1]] for line in table[1].splitlines()]
    for row, values in zip(rows, expected, strict=True):
        for shown, value in zip(row, values, strict=True):
            digit = 10.0 ** -len(shown.partition(".")[2])
            assert float(shown) == pytest.approx(value, rel=0.001, abs=0.51 * digit)


@pytest.mark.parametrize("changes", [{"num_gpus": 0}, {"utilisation": 0.0}, {"bandwidth_gb": 0.0}])
def test_impossible_settings(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        EstimateConfig(**changes)  # type: ignore[arg-type]
