"""Training throughput: plain torch compared with ZeRO, and batches from memory compared with batches from Ray Data.

    python benchmarks/training.py [--quick] [--workers 2]
    python benchmarks/training.py --part checkpoints [--quick] [--workers 2] [--rounds 5] [--folder s3://...]
    python benchmarks/training.py --part formula [--rounds 5]

One Ray Train job runs all combinations in turn on the same workers, so the ratios are of one run. Model and data are
random. The first steps of each combination warm up and are not measured.

``checkpoints`` compares the wall time of training with a checkpoint every 20 steps, synchronous and asynchronous, with
that of training without checkpoints: as the folder is, and if every upload takes a second longer, as over a network.
They take turns on the same workers, and the median of the rounds counts. The time includes waiting for the last
checkpoint. Most checkpoints are the best so far and are uploaded twice.

``formula`` compares the time of a step with the prediction of `ardiff estimate`, for small models on one thread. The
first model gives the operations per second, and the ratios of the others show whether the formula holds. The models
take turns, and the time is CPU time, which other load on the machine disturbs less.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
import ray.data
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from ardiff import distributed
from ardiff.config import build
from ardiff.data import storage
from ardiff.data.latents import LatentStatistics, latent_table
from ardiff.data.streams import LatentStream
from ardiff.diffusion.config import DiffusionConfig
from ardiff.dit import DiT, DiTConfig
from ardiff.randomness import BatchGenerator
from ardiff.resolution import Resolution
from ardiff.train.callbacks import TrainingCallback
from ardiff.train.checkpoint import TrainState
from ardiff.train.config import TrainConfig
from ardiff.train.engines.base import Engine
from ardiff.train.engines.factory import make_engine
from ardiff.train.estimate.config import EstimateConfig
from ardiff.train.estimate.counts import count_step
from ardiff.train.estimate.zero import estimate_stages
from ardiff.train.loop import train
from ardiff.train.tasks import AutoencoderTask, AutoencoderTaskConfig, Batch, DiTTask, DiTTaskConfig, Task
from ardiff.vae import ARAutoencoder, AutoencoderConfig
from ray_jobs.runtime.cluster import ray_cluster
from ray_jobs.runtime.progress import remote_progress
from ray_jobs.training.batches import PacedExecution, ray_batches
from ray_jobs.training.callbacks import new_attempt_id
from ray_jobs.training.checkpoints import CheckpointCallback
from ray_jobs.training.job import TrainJob

FRAMES, TOKENS, DIM, CLIPS, FILES = 16, 4, 4, 64, 16
WARM_UP = 5
SAVE_EVERY = 20
DELAYS = (0.0, 1.0)
"""Seconds by which every upload of a folder takes longer."""
MODES = {"none": None, "synchronous": False, "asynchronous": True}
"""Values of ``train.async_checkpoints``; None stores no checkpoints."""
ENGINES: dict[str, dict[str, Any]] = {
    "torch": {},
    "fsdp": {"engine": "fsdp"},
    **{f"zero {s}": {"engine": "deepspeed", "deepspeed": {"stage": s}} for s in (1, 2, 3)},
}


class LastValues(TrainingCallback):
    """Keeps the last log entry."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def on_log(self, step: int, values: dict[str, float]) -> None:
        self.values = values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["engines", "checkpoints", "formula"], default="engines")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer steps")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of the other parts; the median counts")
    parser.add_argument("--folder", default="", help="where --part checkpoints stores them; a local folder by default")
    options = parser.parse_args()
    if options.part == "formula":
        print_formula(options.rounds)
        return
    with tempfile.TemporaryDirectory() as folder, ray_cluster(2 * options.workers + 2):
        settings = {"folder": folder, "rounds": options.rounds, "quick": options.quick, "workers": options.workers}
        stream, run_folder = write_latents(Path(folder)), options.folder or folder
        filesystem, path = storage.open_filesystem(run_folder)
        with remote_progress("benchmark", 1, "job") as progress:
            trainer = TorchTrainer(
                measure if options.part == "engines" else measure_checkpoints,
                train_loop_config={**settings, "run_folder": run_folder, "stream": stream, "progress": progress},
                torch_config=TorchConfig(backend="gloo"),
                scaling_config=ray.train.ScalingConfig(num_workers=options.workers, resources_per_worker={"CPU": 1}),
                run_config=ray.train.RunConfig(
                    name="ray",
                    storage_path=path,
                    storage_filesystem=filesystem,
                    checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
                ),
            )
            trainer.fit()
        rows = json.loads((Path(folder) / "rows.json").read_text())
    if options.part == "engines":
        print_table(rows)
    else:
        print_lost_time(rows)


def write_latents(folder: Path) -> LatentStream:
    """Random latents in Parquet files."""
    generator = np.random.default_rng(0)
    files = [str(folder / f"part-{i}.parquet") for i in range(FILES)]
    for file in files:
        latents = generator.normal(size=(CLIPS, FRAMES, TOKENS, DIM))
        pq.write_table(latent_table({"latents": latents, "label": np.zeros(CLIPS, dtype=np.int64)}), file)
    return LatentStream(files, [CLIPS] * FILES, (FRAMES, TOKENS, DIM), seed=0, files_per_chunk=2)


def measure(job: dict[str, Any]) -> None:
    """Runs on every worker: all engines with both sources of batches."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.custom_execution_callback_classes.append(PacedExecution)
    torch.set_num_threads(1)
    rows = []
    for (name, changes), feed in itertools.product(ENGINES.items(), ("memory", "Ray Data")):
        rows.append({"engine": name, "feed": feed, **run(changes, feed, job)})
    if distributed.rank() == 0:
        (Path(job["folder"]) / "rows.json").write_text(json.dumps(rows))


def measure_checkpoints(job: dict[str, Any]) -> None:
    """Runs on every worker: seconds of training with each delay and mode, in turns."""
    torch.set_num_threads(1)
    tree = {"batch_size": 16, "num_workers": job["workers"], "log_every": 10**6, "checkpoint_every": SAVE_EVERY}
    config = build(TrainConfig, {**tree, "num_steps": SAVE_EVERY * (2 if job["quick"] else 5)})
    cases = [(delay, mode) for delay in DELAYS for mode in MODES if delay == 0 or mode != "none"]
    rows: dict[str, list[float]] = {f"{mode} | {delay:g}": [] for delay, mode in cases}
    upload = storage.upload_folder
    for turn, (delay, mode) in itertools.product(range(job["rounds"] + 1), cases):
        storage.upload_folder = delayed(upload, delay)  # type: ignore[assignment]
        is_async, task = MODES[mode], make_task(job["quick"])
        engine = make_engine(task.model, config, torch.device("cpu"))
        if distributed.rank() == 0:
            storage.delete_folder(storage.join(job["run_folder"], "best"))
        distributed.sum_over([0.0], engine.device)  # all workers start together
        callbacks = (
            [] if is_async is None else [make_callback(job, replace(config, async_checkpoints=is_async), engine)]
        )
        started = time.monotonic()
        train(task, engine, from_memory(job["stream"], config), config, TrainState(0, 0, ""), callbacks)
        if turn:  # the first warms up
            rows[f"{mode} | {delay:g}"].append(time.monotonic() - started)
    if distributed.rank() == 0:
        (Path(job["folder"]) / "rows.json").write_text(json.dumps(rows))


def delayed(upload: Callable[[Path, str], None], seconds: float) -> Callable[[Path, str], None]:
    """``upload``, which takes ``seconds`` longer."""

    def upload_later(local: Path, uri: str) -> None:
        time.sleep(seconds)
        upload(local, uri)

    return upload_later


def make_callback(job: dict[str, Any], config: TrainConfig, engine: Engine) -> CheckpointCallback:
    """What stores the checkpoints of one training run."""
    description = TrainJob(
        name="benchmark",
        folder=job["run_folder"],
        fingerprint="",
        config=config,
        stream=job["stream"],
        make_task=lambda: make_task(job["quick"]),
        record=lambda: None,
        description={},
        result="",
    )
    attempt = new_attempt_id(engine.device)
    return CheckpointCallback(description, engine, None, attempt, job["progress"], lambda: lambda: None)


def make_task(quick: bool) -> DiTTask:
    """An AR-DiT with random weights."""
    width, depth = (64, 2) if quick else (192, 6)
    sizes = {"num_frames": FRAMES, "num_tokens": TOKENS, "token_dim": DIM, "num_heads": 4}
    model = DiT(build(DiTConfig, {**sizes, "width": width, "depth": depth}))
    return DiTTask(model, DiTTaskConfig(), DiffusionConfig(), LatentStatistics([[0.0] * DIM] * TOKENS, 1.0))


def run(changes: dict[str, Any], feed: str, job: dict[str, Any]) -> dict[str, float]:
    """Throughput of one combination."""
    steps = WARM_UP + (15 if job["quick"] else 60)
    tree = {"num_steps": WARM_UP, "batch_size": 16, "num_workers": job["workers"], "log_every": 10**6, **changes}
    warm_up = build(TrainConfig, {**tree, "loading_tasks": 1})
    config = build(TrainConfig, {**tree, "loading_tasks": 1, "num_steps": steps})
    task = make_task(job["quick"])
    engine = make_engine(task.model, config, torch.device("cpu"))
    if feed == "memory":
        batches = from_memory(job["stream"], config)
    else:
        batches = ray_batches(job["stream"], 0, config, distributed.rank(), job["progress"])
    last = LastValues()
    state = train(task, engine, batches, warm_up, TrainState(0, 0, ""), [last])
    train(task, engine, batches, config, state, [last])
    names = ("samples_per_second", "data_wait_share", "tflops_per_worker", "memory_gib")
    return {name: last.values[name] for name in names}


def from_memory(stream: LatentStream, config: TrainConfig) -> Iterator[Batch]:
    """The first micro-batch, repeated."""
    batch = {name: torch.from_numpy(values[: config.micro_batch_size]) for name, values in stream.load(0).items()}
    return itertools.repeat(batch)


def print_table(rows: list[dict[str, Any]]) -> None:
    base = rows[0]["samples_per_second"]
    print("| engine | batches from | samples/s | relative to torch from memory | waiting for data |")
    print("|---|---|---|---|---|")
    for row in rows:
        rate = row["samples_per_second"]
        print(
            f"| {row['engine']} | {row['feed']} | {rate:.1f} | **{rate / base:.2f}** | {row['data_wait_share']:.1%} |"
        )


def print_lost_time(rows: dict[str, list[float]]) -> None:
    seconds = {mode: statistics.median(values) for mode, values in rows.items()}
    base = seconds["none | 0"]
    print("| checkpoints | s longer per upload | s | relative to none | share of the wall time lost |")
    print("|---|---|---|---|---|")
    for mode, value in seconds.items():
        print(f"| {mode} | {value:.2f} | **{value / base:.3f}** | {1 - base / value:.1%} |")


def formula_cases() -> dict[str, EstimateConfig]:
    """Small models by name. The first one calibrates the operations per second."""

    def dit(width: int, depth: int, **changes: Any) -> EstimateConfig:
        model = DiTConfig(num_frames=FRAMES, num_tokens=16, width=width, depth=depth, num_heads=width // 32)
        return replace(base, dit=model, **changes)

    base = EstimateConfig(num_frames=FRAMES, micro_batch_size=4, gradient_accumulation=1, num_gpus=1, precision="fp32")
    vae = AutoencoderConfig(
        resolution=Resolution(64, 64), patch_size=8, num_tokens=16, token_dim=4, width=192, depth=4, num_heads=6
    )
    return {
        "AR-DiT, width 256, depth 6": dit(256, 6),
        "AR-DiT, width 128, depth 4": dit(128, 4),
        "AR-DiT, width 192, depth 6": dit(192, 6),
        "AR-DiT, width 384, depth 8": dit(384, 8),
        "AR-DiT, width 256, depth 6, 4 micro-batches": dit(256, 6, micro_batch_size=1, gradient_accumulation=4),
        "AR-DiT, width 256, depth 6, checkpointed": dit(256, 6, activation_checkpointing=True),
        "AR-VAE, frames": replace(base, model="vae", vae=vae, num_frames=1, micro_batch_size=16),
        "AR-VAE, clips of 8 frames": replace(base, model="vae", vae=vae, num_frames=8, micro_batch_size=2),
    }


def stepper(case: EstimateConfig) -> Callable[[], None]:
    """A function that makes one update of a model of ``case``."""
    size, passes = case.micro_batch_size, case.gradient_accumulation
    task: Task
    if case.model == "dit":
        tokens, dim = case.dit.num_tokens, case.dit.token_dim
        neutral = LatentStatistics.neutral(tokens, dim)
        task = DiTTask(DiT(case.dit), DiTTaskConfig(), DiffusionConfig(), neutral)
        latents = torch.randn(size, case.num_frames, tokens, dim)
        batch = {"latents": latents, "label": torch.zeros(size, dtype=torch.int64)}
    else:
        settings = AutoencoderTaskConfig(temporal_from_step=int(case.num_frames == 1))
        task = AutoencoderTask(ARAutoencoder(case.vae), settings)
        shape = (size, case.num_frames, *case.vae.resolution, 3)
        batch = {"video": torch.randint(256, shape, dtype=torch.uint8)}
    config = TrainConfig(batch_size=size * passes, activation_checkpointing=case.activation_checkpointing)
    engine = make_engine(task.model, config, torch.device("cpu"))
    draws = BatchGenerator("benchmark")

    def step() -> None:
        for _ in range(passes):
            loss, _ = engine.compute(lambda: task.loss(batch, 0, draws))
            engine.backward(loss / passes)
        engine.step(0, 1.0)

    return step


def print_formula(rounds: int) -> None:
    torch.set_num_threads(1)
    cases = formula_cases()
    steps = {name: stepper(case) for name, case in cases.items()}
    spent: dict[str, list[float]] = {name: [] for name in cases}
    for turn, (name, step) in itertools.product(range(rounds + 1), steps.items()):
        before = time.process_time()
        step()
        if turn:  # the first warms up
            spent[name].append(time.process_time() - before)
    measured = {name: statistics.median(seconds) for name, seconds in spent.items()}
    first = next(iter(cases))
    unit = replace(cases[first], peak_tflops=1.0, utilisation=1.0)
    rate = estimate_stages(unit)[0].compute_seconds / measured[first]  # 10^12 operations per second
    print(f"{1000 * rate:.1f} GFLOP/s, from the first row\n\n| step | parameters | s | formula s | ratio |")
    print("|---|---|---|---|---|")
    for name, case in cases.items():
        predicted = estimate_stages(replace(case, peak_tflops=rate, utilisation=1.0))[0].compute_seconds
        parameters = count_step(case).parameters / 1e6
        ratio = measured[name] / predicted
        print(f"| {name} | {parameters:.1f} M | {measured[name]:.3f} | {predicted:.3f} | **{ratio:.2f}** |")


if __name__ == "__main__":
    main()
