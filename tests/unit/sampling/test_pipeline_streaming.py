"""Streaming, continuation and modes through the pipeline, with pixels."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ardiff.data.latents import LatentStatistics
from ardiff.diffusion.config import DiffusionConfig
from ardiff.dit import DiT, DiTConfig
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.vae import ARAutoencoder, AutoencoderConfig

SETTINGS = {"class_label": [0, 1], "seed": [3, 4], "num_inference_steps": 6, "ar_step": 2, "guidance_scale": 1.5}


@pytest.fixture(scope="module")
def pipeline() -> ARDiffusionPipeline:
    generator = torch.Generator().manual_seed(0)
    vae = ARAutoencoder(
        AutoencoderConfig(resolution=16, patch_size=8, num_tokens=2, width=16, depth=1, num_heads=2, temporal_window=3)
    )
    dit = DiT(DiTConfig(num_frames=8, num_tokens=2, width=16, depth=2, num_heads=2, num_classes=2, attention_window=6))
    for parameter in [*vae.parameters(), *dit.parameters()]:
        parameter.data.normal_(std=0.2, generator=generator)
    statistics = LatentStatistics([[0.1] * 4] * 2, 0.8)
    return ARDiffusionPipeline(vae, dit, DiffusionConfig(), statistics, ["a", "b"])


@pytest.mark.parametrize("frames", [5, 20])
@pytest.mark.parametrize("mode", ["window", "rolling", "full"])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc"])
def test_streaming_equals_batch(pipeline: ARDiffusionPipeline, frames: int, mode: str, solver: str) -> None:
    settings = {**SETTINGS, "num_frames": frames, "mode": mode, "solver": solver}
    video = pipeline(**settings).frames
    streamed = torch.stack(list(pipeline.stream(**settings)), dim=1)
    assert video.shape == (2, frames, 16, 16, 3)
    assert video.dtype == torch.uint8
    assert torch.equal(video, streamed)


def test_incremental_decoding_gives_the_pixels_of_decoding_at_once(pipeline: ARDiffusionPipeline) -> None:
    latents = torch.randn(1, 9, 2, 4, generator=torch.Generator().manual_seed(0))
    at_once = pipeline.vae.decode(latents)
    assert torch.allclose(pipeline.vae.decode_long(latents, chunk=1), at_once, atol=1e-6)


@pytest.mark.parametrize("frames", [6, 20])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc"])
def test_window_equals_full(pipeline: ARDiffusionPipeline, frames: int, solver: str) -> None:
    settings = {**SETTINGS, "num_frames": frames, "solver": solver}
    fast, plain = pipeline(mode="window", **settings).frames, pipeline(mode="full", **settings).frames
    assert (fast.int() - plain.int()).abs().max() <= 1


@pytest.mark.parametrize("mode", ["window", "full"])
def test_continuation_keeps_the_given_frames(pipeline: ARDiffusionPipeline, mode: str) -> None:
    given = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    video = pipeline(num_frames=7, mode=mode, condition=given, **SETTINGS).frames
    other = pipeline(num_frames=7, mode=mode, condition=255 - given, **SETTINGS).frames
    assert video.shape[1] == 7
    assert torch.equal(video[0, :3], video[1, :3])
    assert not torch.equal(video[:, 3:], other[:, 3:])
    image = pipeline(num_frames=3, mode=mode, condition=given[:1], **SETTINGS).frames
    assert torch.equal(image[:, 0], video[:, 0])


def test_only_first_frames_can_be_given(pipeline: ARDiffusionPipeline) -> None:
    frame = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    assert pipeline(num_frames=3, condition=frame, condition_at=[0], **SETTINGS).frames.shape[1] == 3
    with pytest.raises(ValueError, match="causal"):
        pipeline(num_frames=3, condition=frame, condition_at=[2], **SETTINGS)
    with pytest.raises(ValueError, match="nothing to generate"):
        pipeline(num_frames=1, condition=frame, **SETTINGS)
    with pytest.raises(ValueError, match="uint8"):
        pipeline(num_frames=3, condition=frame.float(), **SETTINGS)


def test_progress_counts_frames(pipeline: ARDiffusionPipeline) -> None:
    seen: list[int] = []
    pipeline(num_frames=4, on_frames=seen.append, **SETTINGS)
    assert seen == [1, 2, 3, 4]


def test_bfloat16_weights(pipeline: ARDiffusionPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(str(tmp_path))
    half = ARDiffusionPipeline.from_pretrained(str(tmp_path), torch_dtype=torch.bfloat16)
    for mode in ("window", "rolling", "full"):
        exact = pipeline(num_frames=6, mode=mode, **SETTINGS).frames
        assert (half(num_frames=6, mode=mode, **SETTINGS).frames.float() - exact.float()).abs().mean() < 8


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["window", "rolling"])
def test_4096_frames_in_constant_memory(mode: str) -> None:
    """Streams the quickstart's sizes with random weights; the process must not grow after the first 512 frames."""
    script = f"""
import psutil, torch
from ardiff.data.latents import LatentStatistics
from ardiff.diffusion.config import DiffusionConfig
from ardiff.dit import DiT, DiTConfig
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.vae import ARAutoencoder, AutoencoderConfig
torch.set_num_threads(1)
vae = AutoencoderConfig(resolution=32, patch_size=8, num_tokens=4, width=96, depth=3, num_heads=4, temporal_window=16)
dit = DiTConfig(num_frames=16, num_tokens=4, width=96, depth=4, num_heads=4, num_classes=4, attention_window=16)
statistics = LatentStatistics([[0.0] * 4] * 4, 1.0)
pipeline = ARDiffusionPipeline(ARAutoencoder(vae), DiT(dit), DiffusionConfig(), statistics)
frames = pipeline.stream(num_frames=4096, ar_step=2, num_inference_steps=20, mode="{mode}")
for count, frame in enumerate(frames, 1):
    if count % 512 == 0:
        print(psutil.Process().memory_info().rss / 2**20)
assert count == 4096
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    sizes = [float(line) for line in output.split()]
    assert len(sizes) == 8
    assert max(sizes) - sizes[0] < 16, sizes  # MiB
