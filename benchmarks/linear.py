"""CPU time of the quickstart's models on one thread, with linear layers by torch and by oneDNN: training and encoding.

    python benchmarks/linear.py

Both variants alternate in one process. CPU time is measured because other work on the machine disturbs it less than
wall time. Prints the table of docs/performance.md.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ardiff.config import find_config, load_config
from ardiff.data.latents import LatentStatistics
from ardiff.dit import DiT
from ardiff.onednn import pack_linear
from ardiff.randomness import BatchGenerator, torch_generator
from ardiff.train.config import TrainConfig
from ardiff.train.engines.factory import make_engine
from ardiff.train.tasks import AutoencoderTask, Batch, DiTTask, Task
from ardiff.vae import ARAutoencoder
from ray_jobs.encode import EncodeConfig
from ray_jobs.training.config import TrainDiTConfig, TrainVAEConfig

VARIANTS = {"torch": False, "oneDNN": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="rounds per variant; the median is printed")
    parser.add_argument("--steps", type=int, default=5, help="steps per round")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| step | torch ms | oneDNN ms | ratio |\n|---|---|---|---|")
    for name, make in (
        ("AR-VAE, training", lambda flag: stepper(*autoencoder(), onednn=flag)),
        ("AR-DiT, training", lambda flag: stepper(*dit(), onednn=flag)),
        ("AR-VAE, encoding 64 clips", encoder),
    ):
        steps = {variant: make(flag) for variant, flag in VARIANTS.items()}
        times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}  # milliseconds per step
        for number in range(arguments.rounds + 1):
            for variant, step in steps.items():
                start = time.process_time()
                for _ in range(arguments.steps):
                    step()
                if number:  # the first round warms up
                    times[variant].append(1000 * (time.process_time() - start) / arguments.steps)
        plain, onednn = (statistics.median(times[variant]) for variant in VARIANTS)
        print(f"| {name} | {plain:.1f} | {onednn:.1f} | **{plain / onednn:.2f}** |", flush=True)


def autoencoder() -> tuple[Task, Batch, TrainConfig]:
    """The task, a batch of noise and the training settings of the quickstart's AR-VAE."""
    config = load_config(TrainVAEConfig, [find_config("quickstart") / "train_vae.yaml"], [])
    shape = (config.train.batch_size, config.clips.num_frames, config.vae.resolution, config.vae.resolution, 3)
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
    engine = make_engine(task.model, replace(config, onednn=onednn), torch.device("cpu"))
    draws = BatchGenerator(torch_generator("benchmark"), config.batch_size, 0)

    def step() -> None:
        loss, _ = engine.compute(lambda: task.loss(batch, 0, draws))
        engine.backward(loss)
        engine.step(0, 1.0)

    return step


def encoder(packed: bool) -> Callable[[], Tensor]:
    """A function that encodes a batch of clips, with packed weights as ``ardiff encode``, or by torch alone."""
    config = load_config(EncodeConfig, [find_config("quickstart") / "encode.yaml"], [])
    sizes = load_config(TrainVAEConfig, [find_config("quickstart") / "train_vae.yaml"], []).vae
    video = torch.rand(config.batch_size, config.num_frames, 3, sizes.resolution, sizes.resolution)
    model = ARAutoencoder(sizes)
    if packed:
        pack_linear(model)
    return torch.no_grad()(lambda: model.latents(video))


if __name__ == "__main__":
    main()
