"""Trains an AR-VAE and an AR-DiT on the videos of a folder; subfolders are classes.

python examples/train_on_a_folder.py my_videos runs/own --vae-steps 2000 --dit-steps 4000
"""

import argparse
from collections.abc import Sequence

from ardiff.data.config import ClipConfig
from ardiff.data.manifest import class_names, read_manifest
from ardiff.dit.config import DiTConfig
from ardiff.train.config import OptimizerConfig, TrainConfig
from ardiff.vae.config import AutoencoderConfig
from ray_jobs import encode, prepare, train_dit, train_vae
from ray_jobs.encode import EncodeConfig
from ray_jobs.prepare import PrepareConfig
from ray_jobs.runtime.cluster import ray_cluster
from ray_jobs.training.config import TrainDiTConfig, TrainVAEConfig


def train_config(steps: int) -> TrainConfig:
    """The optimization of a small model: EMA over 100 steps, Muon, checkpoints that a restart resumes from."""
    optimizer = OptimizerConfig(name="muon", lr=1e-3, schedule="cosine", warmup_steps=min(20, steps - 1))
    every = max(1, steps // 5)
    return TrainConfig(
        num_steps=steps, cpu_threads=1, ema_decay=0.99, optimizer=optimizer, log_every=every, checkpoint_every=every
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the pipeline to OUTPUT/dit/pipeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos")
    parser.add_argument("output")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--width", type=int, default=128, help="width of both models")
    parser.add_argument("--vae-steps", type=int, default=2000)
    parser.add_argument("--dit-steps", type=int, default=4000)
    options = parser.parse_args(arguments)
    output, model = options.output, {"width": options.width, "num_heads": 4}
    with ray_cluster():
        data = PrepareConfig(source=options.videos, output=f"{output}/data")
        prepare.run(data)
        clips = ClipConfig(manifest=data.manifest, num_frames=4)
        vae = AutoencoderConfig(resolution=options.size, num_tokens=4, token_dim=8, depth=3, **model)
        first = TrainVAEConfig(output=f"{output}/vae", clips=clips, vae=vae, train=train_config(options.vae_steps))
        train_vae.run(first)
        latents = encode.run(EncodeConfig(manifest=data.manifest, vae=first.model, output=f"{output}/latents"))
        classes = len(class_names(read_manifest(data.manifest)))
        dit = DiTConfig(num_frames=16, num_tokens=4, token_dim=8, depth=4, num_classes=classes, **model)
        second = TrainDiTConfig(output=f"{output}/dit", latents=latents, dit=dit, train=train_config(options.dit_steps))
        train_dit.run(second)


if __name__ == "__main__":
    main()
