"""Fine-tunes the AR-DiT of a pipeline on the videos of a folder, which must have the pipeline's number of classes.

python examples/fine_tune.py runs/own/dit/pipeline other_videos runs/tuned --steps 500 --lr 1e-4
"""

import argparse
from collections.abc import Sequence

from ardiff.pipeline import ARDiffusionPipeline
from ardiff.pretrained import save_autoencoder
from ardiff.train.config import OptimizerConfig, TrainConfig
from ray_jobs import encode, prepare, train_dit
from ray_jobs.encode import EncodeConfig
from ray_jobs.prepare import PrepareConfig
from ray_jobs.runtime.cluster import ray_cluster
from ray_jobs.training.config import TrainDiTConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the pipeline to OUTPUT/dit/pipeline. The AR-VAE stays as it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("videos")
    parser.add_argument("output")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--lr", type=float, default=1e-4)
    options = parser.parse_args(arguments)
    output, start = options.output, ARDiffusionPipeline.from_pretrained(options.pipeline)
    save_autoencoder(f"{output}/vae", start.vae)
    with ray_cluster():
        data = PrepareConfig(source=options.videos, output=f"{output}/data")
        prepare.run(data)
        frames = start.dit.config.num_frames
        clips = EncodeConfig(manifest=data.manifest, vae=f"{output}/vae", output=f"{output}/latents", num_frames=frames)
        train = TrainConfig(
            num_steps=options.steps,
            cpu_threads=1,
            optimizer=OptimizerConfig(lr=options.lr),
            ema_decay=0.99,
            checkpoint_every=max(1, options.steps // 5),
        )
        tuned = TrainDiTConfig(
            output=f"{output}/dit",
            latents=encode.run(clips),
            init_from=options.pipeline,
            dit=start.dit.config,
            diffusion=start.diffusion,
            train=train,
        )
        train_dit.run(tuned)


if __name__ == "__main__":
    main()
