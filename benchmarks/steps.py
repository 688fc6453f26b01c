"""CPU time on one thread: the quickstart's models with linear layers by torch and by oneDNN, Muon by torch and by
ardiff, and the noise of a large batch drawn whole and drawn for a worker's own samples.

    python benchmarks/steps.py

Both variants alternate in one process. CPU time is measured because other work on the machine disturbs it less than
wall time. Prints the tables of docs/performance.md.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ardiff.config import find_config, load_config
from ardiff.data.latents import LatentStatistics
from ardiff.diffusion.timestep_sampling import sample_timesteps
from ardiff.dit import DiT
from ardiff.onednn import pack_linear
from ardiff.randomness import BatchGenerator, torch_generator
from ardiff.train.config import TrainConfig
from ardiff.train.engines.factory import make_engine
from ardiff.train.muon import Muon
from ardiff.train.tasks import AutoencoderTask, Batch, DiTTask, Task
from ardiff.vae import ARAutoencoder
from ray_jobs.encode import EncodeConfig
from ray_jobs.training.config import TrainDiTConfig, TrainVAEConfig

Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="rounds per variant; the median is printed")
    parser.add_argument("--steps", type=int, default=5, help="steps per round")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tables: dict[tuple[str, str], dict[str, Callable[[bool], Step]]] = {
        ("torch", "oneDNN"): {
            "AR-VAE, training": lambda flag: stepper(*autoencoder(), onednn=flag),
            "AR-DiT, training": lambda flag: stepper(*dit(), onednn=flag),
            "AR-VAE, encoding 64 clips": encoder,
        },
        ("torch.optim.Muon", "ardiff's Muon"): {
            "AR-VAE, update of the weights": lambda flag: updater(autoencoder()[0].model, batched=flag),
            "AR-DiT, update of the weights": lambda flag: updater(dit()[0].model, batched=flag),
        },
        ("whole batch", "own samples"): {
            "noise of 1024 clips of 16 frames, on one of 64 workers": lambda flag: drawer(16, own=flag),
            "noise of 1024 clips of 128 frames, on one of 64 workers": lambda flag: drawer(128, own=flag),
        },
    }
    for (plain, fast), rows in tables.items():
        print(f"| step | {plain} ms | {fast} ms | ratio |\n|---|---|---|---|")
        for name, make in rows.items():
            before, after = measure([make(False), make(True)], arguments.rounds, arguments.steps)
            print(f"| {name} | {before:.1f} | {after:.1f} | **{before / after:.2f}** |", flush=True)
        print()


def measure(variants: list[Step], rounds: int, steps: int) -> list[float]:
    """Milliseconds of CPU time per step of each variant, the median of the rounds. The first round warms up."""
    times: list[list[float]] = [[] for _ in variants]
    for number in range(rounds + 1):
        for variant, step in zip(times, variants, strict=True):
            start = time.process_time()
            for _ in range(steps):
                step()
            if number:
                variant.append(1000 * (time.process_time() - start) / steps)
    return [statistics.median(variant) for variant in times]


def autoencoder() -> tuple[Task, Batch, TrainConfig]:
    """The task, a batch of noise and the training settings of the quickstart's AR-VAE."""
    config = load_config(TrainVAEConfig, [find_config("quickstart") / "train_vae.yaml"], [])
    shape = (config.train.batch_size, config.clips.num_frames, *config.vae.resolution, 3)
    video = torch.randint(256, shape, dtype=torch.uint8)
    return AutoencoderTask(ARAutoencoder(config.vae), config.task), {"video": video}, config.train


def dit() -> tuple[Task, Batch, TrainConfig]:
    """The task, a batch of noise and the training settings of the quickstart's AR-DiT."""
    config = load_config(TrainDiTConfig, [find_config("quickstart") / "train_dit.yaml"], [])
    model, size = config.dit, config.train.batch_size
    statistics = LatentStatistics([[0.0] * model.token_dim] * model.num_tokens, 1.0)
    latents = torch.randn(size, model.num_frames, model.num_tokens, model.token_dim)
    batch = {"latents": latents, "label": torch.randint(model.num_classes, (size,))}
    return DiTTask(DiT(model), config.task, config.diffusion, statistics), batch, config.train


def stepper(task: Task, batch: Batch, config: TrainConfig, onednn: bool) -> Callable[[], None]:
    """A function that makes one training step."""
    engine = make_engine(task.model, replace(config, linear="onednn" if onednn else "torch"), torch.device("cpu"))
    draws = BatchGenerator("benchmark")

    def step() -> None:
        loss, _ = engine.compute(lambda: task.loss(batch, 0, draws))
        engine.backward(loss)
        engine.step(0, 1.0)

    return step


def updater(model: nn.Module, batched: bool) -> Step:
    """A function that updates the matrices of the blocks from random gradients."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "blocks." in name]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    return (Muon if batched else torch.optim.Muon)(matrices, lr=1e-3, weight_decay=0.0).step


def drawer(num_frames: int, own: bool) -> Step:
    """A function that draws the timesteps and noise of the first 16 of 1024 clips of the paper's latents."""

    def draw() -> Tensor:
        if own:
            draws = BatchGenerator("benchmark")
            sample_timesteps("fopp", 16, num_frames, 1000, draws.generators(16))
            return draws(16, lambda g: torch.randn(num_frames, 32, 4, generator=g))
        generator = torch_generator("benchmark")
        sample_timesteps("fopp", 1024, num_frames, 1000, generator)
        return torch.randn(1024, num_frames, 32, 4, generator=generator)[:16]

    return draw


def encoder(packed: bool) -> Callable[[], Tensor]:
    """A function that encodes a batch of clips, with packed weights as ``ardiff encode``, or by torch alone."""
    config = load_config(EncodeConfig, [find_config("quickstart") / "encode.yaml"], [])
    sizes = load_config(TrainVAEConfig, [find_config("quickstart") / "train_vae.yaml"], []).vae
    video = torch.rand(config.batch_size, config.num_frames, 3, *sizes.resolution)
    model = ARAutoencoder(sizes)
    if packed:
        pack_linear(model)
    return torch.no_grad()(lambda: model.latents(video))


if __name__ == "__main__":
    main()
