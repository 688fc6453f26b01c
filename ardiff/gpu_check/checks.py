"""The checks. Each yields rows as soon as they are measured."""

import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from ardiff.data.latents import LatentStatistics
from ardiff.data.transforms import to_unit
from ardiff.errors import ArdiffError
from ardiff.gpu_check.config import CheckName
from ardiff.gpu_check.launches import LaunchCounter
from ardiff.gpu_check.setup import Row, Setup, randomised, rms
from ardiff.metrics.networks.i3d import I3D
from ardiff.metrics.weights import compute_exactly
from ardiff.randomness import BatchGenerator
from ardiff.sampling.config import AttentionBackend, Backend, EngineConfig
from ardiff.sampling.cost import sequential_passes
from ardiff.sampling.engine import SamplingEngine
from ardiff.sampling.full import stream_request
from ardiff.sampling.params import ModelInfo, SamplingParams, validate
from ardiff.sampling.request import SampleRequest
from ardiff.train.checkpoint import write_tensors
from ardiff.train.config import OptimizerConfig, TrainConfig
from ardiff.train.engines.base import Engine
from ardiff.train.engines.config import DeepSpeedConfig
from ardiff.train.engines.factory import make_engine
from ardiff.train.estimate.config import EstimateConfig
from ardiff.train.estimate.counts import count_step
from ardiff.train.estimate.zero import estimate_stages
from ardiff.train.shards import ShardReader
from ardiff.train.tasks import DiTTask, DiTTaskConfig

Rows = Iterator[Row]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIMITS = {"fp32": 1e-3, "bf16": 0.1}
"""Largest relative error (rms) of latents against float64, after some steps of sampling."""
SHAPES = ((1, 1), (1, 16), (8, 1), (16, 1))
"""Requests and videos of each that are sampled together."""
ENGINES = ("torch", "fsdp", "zero0", "zero1", "zero2", "zero3")


def ceilings(setup: Setup) -> Rows:
    """The rates of the device that bound everything else."""
    elements = 2**22 if setup.tiny else 2**28
    source = torch.ones(elements, device=setup.device)
    target = torch.empty_like(source)
    seconds = setup.seconds(lambda: target.copy_(source))
    yield Row("ceilings", "copy", 2 * source.nbytes / seconds / 1e9, "GB/s")
    for name, dtype in DTYPES.items():
        yield Row("ceilings", f"matrix product, {name}", setup.matrix_rate(dtype), "TFLOP/s")
    one = torch.ones(1, device=setup.device)

    def launch() -> None:
        for _ in range(1000):
            one.add_(1)

    yield Row("ceilings", "launch", setup.seconds(launch) * 1000, "us")


@torch.no_grad()
def exactness(setup: Setup) -> Rows:
    """Sampled latents against the plain sampler on a CPU in float64, and one seed in several batches."""
    depth = 4
    model = setup.dit(depth)
    params = SamplingParams(num_frames=model.config.num_frames + 2, num_inference_steps=4, ar_step=2, guidance_scale=2)
    request = _request(setup, params, 1)
    expected = torch.cat(list(stream_request(model.double(), setup.diffusion, request)), dim=1)
    attentions: tuple[AttentionBackend, ...] = ("ragged", "masked", "flex") if setup.compile else ("ragged", "masked")
    backends: tuple[Backend, ...] = ("plain", "compiled") if setup.compile else ("plain",)
    for precision, dtype in DTYPES.items():
        on_device = setup.dit(depth).to(setup.device, dtype)
        for backend in backends:
            for attention in attentions:
                engine = EngineConfig(attention_backend=attention, backend=backend)
                error = rms(_sample(on_device, setup, [request], engine)[0], expected)
                yield Row("exactness", f"{attention}, {backend}, {precision}", error, "rms", LIMITS[precision])
        alone = _sample(on_device, setup, [request])[0]
        for count in (2, 16):
            together = _sample(on_device, setup, [_request(setup, params, count)])[0][:1]
            name = f"a video among {count}, {precision}"
            yield Row("exactness", name, rms(together, alone), "rms", LIMITS[precision])


@torch.no_grad()
def sampling(setup: Setup) -> Rows:
    """Speed of the engine, with 1 to 16 requests together, in bf16."""
    model = setup.dit().to(setup.device, torch.bfloat16)
    steps, frames = (4, 4) if setup.tiny else (20, 16)
    ar_step = steps // 4
    params = SamplingParams(num_frames=frames, num_inference_steps=steps, ar_step=ar_step)
    config = EngineConfig(max_requests=64, max_frames=frames * 16)
    for requests, videos in SHAPES:
        batch = [_request(setup, params, videos) for _ in range(requests)]
        run = functools.partial(_sample, model, setup, batch, config)
        seconds = setup.seconds(run, repeats=2)
        with LaunchCounter(setup.device) as counter:
            run()
        iterations = sequential_passes(batch[0].params)
        name = f"{requests} x {videos} videos"
        yield Row("sampling", f"{name}, iteration", 1000 * seconds / iterations, "ms")
        yield Row("sampling", f"{name}, kernels an iteration", counter.kernels / iterations, "")
        yield Row("sampling", f"{name}, frames", requests * videos * frames / seconds, "1/s")


def training(setup: Setup) -> Rows:
    """Speed and memory of a training step of each engine, in bf16, against the estimate."""
    size = 2 if setup.tiny else 16
    frames, peak = setup.dit_config.num_frames, setup.peak_tflops or setup.matrix_rate(torch.bfloat16)
    estimate = EstimateConfig(dit=setup.dit_config, num_frames=frames, micro_batch_size=size, num_gpus=1)
    stages = {f"zero{stage.stage}": stage.memory / 2**30 for stage in estimate_stages(estimate)}
    flops = 3 * count_step(estimate).flops
    for name in ENGINES:
        step = _stepper(setup, name, size)
        seconds = setup.seconds(step, repeats=3)
        yield Row("training", f"{name}, step of {size} clips", 1000 * seconds, "ms")
        yield Row("training", f"{name}, utilisation", 100 * flops / seconds / 1e12 / peak, "%")
        if (memory := setup.peak_memory(step)) is not None:
            yield Row("training", f"{name}, memory", memory, "GiB")
            if name in stages:
                yield Row("training", f"{name}, memory over the estimate", memory / stages[name], "", 1.25)
        del step


def checkpoints(setup: Setup) -> Rows:
    """A checkpoint of each engine, read by each other one: the largest difference of weights and EMA."""
    with tempfile.TemporaryDirectory() as name:
        for writer in ENGINES:
            engine = _engine(setup, writer, depth=2)
            _update(setup, engine, 2)
            folder = Path(name) / writer
            write_tensors(folder, engine)
            shards = ShardReader(folder)
            largest = 0.0
            for reader in ENGINES:
                other = _engine(setup, reader, depth=2)
                other.restore(shards)
                for group, key, tensor in other.tensors():
                    if group in ("model", "ema"):
                        difference = tensor.float().cpu() - shards.read(group, key)
                        largest = max(largest, float(difference.abs().max()))
                del other
            yield Row("checkpoints", f"of {writer}, read by all", largest, "", 0.0)
            del engine


@torch.no_grad()
def autoencoder(setup: Setup) -> Rows:
    """Speed of the AR-VAE, and its error in bf16."""
    model, config = setup.vae(), setup.vae_config
    generator = torch.Generator().manual_seed(0)
    shape = (16, config.temporal_window, *config.resolution, 3)
    video = to_unit(torch.randint(256, shape, dtype=torch.uint8, generator=generator))  # (16, F, 3, H, W)
    expected = model.latents(video[:1])
    for precision, dtype in DTYPES.items():
        on_device = setup.vae().to(setup.device, dtype)
        clips = video.to(setup.device, dtype)
        latents = on_device.latents(clips[:1])
        yield Row("autoencoder", f"latents, {precision}", rms(latents, expected), "rms", LIMITS[precision])
        seconds = setup.seconds(functools.partial(on_device.latents, clips), repeats=2)
        frames = len(clips) * clips.shape[1]
        yield Row("autoencoder", f"encoding, {precision}", frames / seconds, "frames/s")
        for count in (1, 16):
            tokens = on_device.latents(clips[:count])
            seconds = setup.seconds(functools.partial(on_device.decode, tokens), repeats=2)
            yield Row("autoencoder", f"decoding {count} together, {precision}", count * shape[1] / seconds, "frames/s")


@torch.no_grad()
def features(setup: Setup) -> Rows:
    """I3D, the network of FVD, against the CPU, computed as for scores."""
    compute_exactly()
    model = randomised(I3D)
    clips = torch.randn(1 if setup.tiny else 4, 3, 16, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = model(clips[:1])
    model.to(setup.device)
    yield Row("features", "I3D", rms(model(clips[:1].to(setup.device)), expected), "rms", 1e-3)
    on_device = clips.to(setup.device)
    repeats = 1 if setup.tiny else 3
    yield Row("features", "I3D", len(clips) / setup.seconds(lambda: model(on_device), repeats), "clips/s")


CHECKS: dict[CheckName, Callable[[Setup], Rows]] = {
    "ceilings": ceilings,
    "exactness": exactness,
    "sampling": sampling,
    "training": training,
    "checkpoints": checkpoints,
    "autoencoder": autoencoder,
    "features": features,
}


def _request(setup: Setup, params: SamplingParams, videos: int) -> SampleRequest:
    """A checked request for videos with the seeds 0, 1, ..."""
    params = validate(replace(params, class_label=0), ModelInfo.from_configs(setup.dit_config, setup.diffusion))
    return SampleRequest(videos=tuple(replace(params, seed=seed) for seed in range(videos)))


def _sample(
    model: torch.nn.Module, setup: Setup, requests: list[SampleRequest], config: EngineConfig | None = None
) -> list[Tensor]:
    """The latents of each request, ``(B, F, L, D)``."""
    engine = SamplingEngine(model, setup.diffusion, config)  # type: ignore[arg-type]
    parts: dict[int, list[Tensor]] = {engine.submit(request): [] for request in requests}
    while engine.busy:
        for finished in engine.step():
            parts[finished.request_id].append(finished.latents)
    return [torch.cat(chunks, dim=1) for chunks in parts.values()]


def _engine(setup: Setup, name: str, depth: int | None = None) -> Engine:
    """An engine with an AR-DiT: ``torch``, ``fsdp``, or ``zero`` and a stage."""
    if not dist.is_initialized():
        backend = "nccl" if setup.device.type == "cuda" else "gloo"
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # DeepSpeed reads them
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    common = {"precision": "bf16", "batch_size": 16, "optimizer": OptimizerConfig(lr=1e-4), "device": setup.device.type}
    if name.startswith("zero"):
        stage = DeepSpeedConfig(stage=int(name.removeprefix("zero")))  # type: ignore[arg-type]
        config = TrainConfig(engine="deepspeed", deepspeed=stage, **common)  # type: ignore[arg-type]
    else:
        config = TrainConfig(engine=name, **common)  # type: ignore[arg-type]
    return make_engine(setup.dit(depth).train(), config, setup.device)


def _update(setup: Setup, engine: Engine, size: int) -> None:
    """A training step on random clips."""
    config = setup.dit_config
    statistics = LatentStatistics.neutral(config.num_tokens, config.token_dim)
    task = DiTTask(engine.model, DiTTaskConfig(), setup.diffusion, statistics)  # type: ignore[arg-type]
    shape = (size, config.num_frames, config.num_tokens, config.token_dim)
    batch = {
        "latents": torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(setup.device),
        "label": torch.zeros(size, dtype=torch.int64, device=setup.device),
    }
    loss, _ = engine.compute(lambda: task.loss(batch, 0, BatchGenerator("gpu-check", 0)))
    engine.backward(loss)
    if not torch.isfinite(torch.tensor(engine.step(0, 1.0))):
        raise ArdiffError("the norm of the gradients is not finite")


def _stepper(setup: Setup, name: str, size: int) -> Callable[[], None]:
    engine = _engine(setup, name)
    return lambda: _update(setup, engine, size)
