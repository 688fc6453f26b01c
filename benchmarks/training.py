"""What training costs: plain torch beside ZeRO, and batches from memory beside those that Ray Data feeds.

    python benchmarks/training.py [--quick] [--workers 2]

One Ray Train job runs all combinations one after the other on the same workers, so that the ratios are of one run. The
model and the data are made here; the steps before the measured ones warm up.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
import ray.data
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from ardiff.config import build
from ardiff.data.latents import LatentStatistics, latent_table
from ardiff.data.streams import LatentStream
from ardiff.diffusion.process import DiffusionConfig
from ardiff.dit import DiT, DiTConfig
from ardiff.train import workers
from ardiff.train.checkpoint import TrainState
from ardiff.train.loop import TrainConfig, make_engine, train
from ardiff.train.tasks import Batch, DiTTask, DiTTaskConfig
from ray_jobs.batches import PacedExecution, ray_batches
from ray_jobs.common import ray_cluster, remote_progress

FRAMES, TOKENS, DIM, CLIPS, FILES = 16, 4, 4, 64, 16
WARM_UP = 5
ENGINES: dict[str, dict[str, Any]] = {
    "torch": {},
    **{f"zero {s}": {"engine": "deepspeed", "deepspeed": {"stage": s}} for s in (1, 2, 3)},
}


class Last:
    """Keeps what was logged last."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def progress(self, step: int, loss: float) -> None: ...

    def samples(self, step: int, videos: torch.Tensor) -> None: ...

    def checkpoint(self, state: TrainState) -> None: ...

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.values = values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer steps")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ray_cluster(2 * options.workers + 2):
        settings = {"folder": folder, "quick": options.quick, "workers": options.workers}
        stream = write_latents(Path(folder))
        with remote_progress("benchmark", 1, "job") as monitor:
            trainer = TorchTrainer(
                measure,
                train_loop_config={**settings, "stream": stream, "monitor": monitor},
                torch_config=TorchConfig(backend="gloo"),
                scaling_config=ray.train.ScalingConfig(num_workers=options.workers, resources_per_worker={"CPU": 1}),
                run_config=ray.train.RunConfig(name="benchmark", storage_path=folder),
            )
            trainer.fit()
        rows = json.loads((Path(folder) / "rows.json").read_text())
    print_table(rows)


def write_latents(folder: Path) -> LatentStream:
    """Random latents in Parquet files."""
    generator = np.random.default_rng(0)
    files = [str(folder / f"part-{i}.parquet") for i in range(FILES)]
    for file in files:
        latents = generator.normal(size=(CLIPS, FRAMES, TOKENS, DIM))
        pq.write_table(latent_table({"latents": latents, "label": np.zeros(CLIPS, dtype=np.int64)}), file)
    return LatentStream(files, [CLIPS] * FILES, (FRAMES, TOKENS, DIM), seed=0, files_per_chunk=2)


def measure(job: dict[str, Any]) -> None:
    """On every worker: all engines with both feeds."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.custom_execution_callback_classes.append(PacedExecution)
    torch.set_num_threads(1)
    rows = []
    for (name, changes), feed in itertools.product(ENGINES.items(), ("memory", "Ray Data")):
        rows.append({"engine": name, "feed": feed, **run(changes, feed, job)})
    if workers.rank() == 0:
        (Path(job["folder"]) / "rows.json").write_text(json.dumps(rows))


def run(changes: dict[str, Any], feed: str, job: dict[str, Any]) -> dict[str, float]:
    """Samples per second and more of one combination."""
    steps = WARM_UP + (15 if job["quick"] else 60)
    tree = {"num_steps": WARM_UP, "batch_size": 16, "num_workers": job["workers"], "log_every": 10**6, **changes}
    warm_up = build(TrainConfig, {**tree, "loading_tasks": 1})
    config = build(TrainConfig, {**tree, "loading_tasks": 1, "num_steps": steps})
    width, depth = (64, 2) if job["quick"] else (192, 6)
    sizes = {"num_frames": FRAMES, "num_tokens": TOKENS, "token_dim": DIM, "num_heads": 4}
    model = DiT(build(DiTConfig, {**sizes, "width": width, "depth": depth}))
    statistics = LatentStatistics([[0.0] * DIM] * TOKENS, 1.0)
    task = DiTTask(model, DiTTaskConfig(), DiffusionConfig(), statistics)
    engine = make_engine(model, config, torch.device("cpu"))
    if feed == "memory":
        batches = from_memory(job["stream"], config)
    else:
        batches = ray_batches(job["stream"], 0, config, workers.rank(), job["monitor"])
    observer = Last()
    state = train(task, engine, batches, warm_up, TrainState(0, 0, ""), observer)
    train(task, engine, batches, config, state, observer)
    names = ("samples_per_second", "data_wait_share", "tflops_per_worker", "memory_gib")
    return {name: observer.values[name] for name in names}


def from_memory(stream: LatentStream, config: TrainConfig) -> Iterator[Batch]:
    """The first batch, again and again."""
    batch = {name: torch.from_numpy(values[: config.micro_batch_size]) for name, values in stream.load(0).items()}
    return itertools.repeat(batch)


def print_table(rows: list[dict[str, Any]]) -> None:
    base = rows[0]["samples_per_second"]
    print("| engine | batches from | samples/s | to torch from memory | waiting for data |")
    print("|---|---|---|---|---|")
    for row in rows:
        rate = row["samples_per_second"]
        print(
            f"| {row['engine']} | {row['feed']} | {rate:.1f} | **{rate / base:.2f}** | {row['data_wait_share']:.1%} |"
        )


if __name__ == "__main__":
    main()
