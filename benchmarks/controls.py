"""Shows how the quick evaluation ranks damaged real videos: the table of docs/evaluation.md.

    python benchmarks/controls.py            # five seeds of the data and of the random network, 128 clips a set
    python benchmarks/controls.py --quick    # one seed, 64 clips

A row is a set of damaged real clips. Beside the controls of the evaluation there are sets with the same trajectories
and colours whose shape turns into another one: at every frame, or at a share of the frames. The distance is the mean
over seeds and its range; "against jitter" the smallest ratio over seeds. The other columns are shares in percent.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from ardiff.data.config import SyntheticConfig
from ardiff.data.synthetic import CLASSES, draw_scene, render_scene, render_video
from ardiff.metrics.controls import CONTROLS, blur
from ardiff.metrics.frechet import frechet_distance
from ardiff.metrics.networks.random3d import RandomVideoFeatures, scale_features
from ardiff.metrics.shapes import SHAPE_MEASURES, shape_measures
from ardiff.metrics.tracking import track

BATCH = 16
"""Clips that a control sees at once, as in the quick evaluation."""
TURNING = {"shape turns, 5 % of frames": 0.05, "shape turns, 34 % of frames": 0.34, "shape turns, all frames": 1.0}
SHAKING = {"position off by 0.25 px": 0.25, "position off by 0.5 px": 0.5}


def turning(config: SyntheticConfig, index: int, share: float, generator: np.random.Generator) -> np.ndarray:
    """Test video ``index`` whose shape turns into another one at a ``share`` of the frames, uint8 ``(F, H, W, 3)``."""
    scene = draw_scene(config, index, "test")
    centre = scene.centres(config.num_frames)
    steps = generator.integers(1, len(CLASSES), len(centre)) * (generator.random(len(centre)) < share)
    steps[0] = index
    scenes = [replace(scene, shape=shape) for shape in CLASSES]
    drawn = np.stack([render_scene(config.resolution, shown, centre) for shown in scenes])  # (K, F, H, W, 3)
    chosen: np.ndarray = drawn[steps.cumsum() % len(CLASSES), np.arange(len(centre))]
    return chosen


def shaking(config: SyntheticConfig, index: int, pixels: float, generator: np.random.Generator) -> np.ndarray:
    """Test video ``index`` with Gaussian noise on its positions, ``pixels`` in y and x, uint8 ``(F, H, W, 3)``."""
    scene = draw_scene(config, index, "test")
    centre = scene.centres(config.num_frames)
    return render_scene(config.resolution, scene, centre + generator.normal(0, pixels, centre.shape))


def damaged_sets(seed: int, clips: int) -> dict[str, np.ndarray]:
    """The reference, other real clips and damaged ones, by name, uint8 ``(clips, F, H, W, 3)`` each."""
    config, generator = SyntheticConfig(num_frames=16, num_long=0, seed=seed), np.random.default_rng(seed)
    indices = range(clips, 2 * clips)
    real = np.stack([render_video(config, index, "test") for index in indices])

    def each(function: Callable[..., np.ndarray], amount: float) -> np.ndarray:
        return np.stack([function(config, index, amount, generator) for index in indices])

    grain = generator.normal(0.0, 4.0, real.shape)
    sets = {
        "reference": np.stack([render_video(config, index, "test") for index in range(clips)]),
        "real": real,
        "light blur and noise": np.clip(blur(real, sigma=0.5) + grain, 0, 255).astype(np.uint8),
    }
    for name, control in CONTROLS.items():
        sets[name] = np.concatenate([control(real[i : i + BATCH], generator) for i in range(0, clips, BATCH)])
    sets |= {name: each(turning, share) for name, share in TURNING.items()}
    return sets | {name: each(shaking, pixels) for name, pixels in SHAKING.items()}


def distances(seed: int, sets: dict[str, np.ndarray]) -> dict[str, float]:
    """The distance of each set from the reference, with the random network of ``seed``."""
    extractor = RandomVideoFeatures(seed)
    features = {n: torch.cat([extractor(b) for b in torch.from_numpy(v).split(32)]) for n, v in sets.items()}
    reference = features.pop("reference")
    scaled = scale_features(reference, reference)
    return {name: frechet_distance(scaled, scale_features(reference, values)) for name, values in features.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, 64 clips")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--clips", type=int, default=128)
    options = parser.parse_args()
    seeds, clips = (1, 64) if options.quick else (options.seeds, options.clips)
    torch.set_num_threads(1)
    scores: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    for seed in range(seeds):
        sets = damaged_sets(seed, clips)
        for name, value in distances(seed, sets).items():
            scores.setdefault(name, []).append(value)
        if seed == 0:
            for name, videos in sets.items():
                rows = [shape_measures(track(video), index % len(CLASSES)) for index, video in enumerate(videos)]
                shares[name] = [float(np.mean([row[measure] for row in rows])) for measure in SHAPE_MEASURES]
    print(f"| set | distance, {seeds} seeds | against jitter | {' | '.join(SHAPE_MEASURES)} |")
    print("|---" * (3 + len(SHAPE_MEASURES)) + "|")
    for name in sorted(scores, key=lambda name: np.mean(scores[name])):
        values = np.array(scores[name])
        spread = f"{values.mean():.0f} ({values.min():.0f} to {values.max():.0f})"
        ratio = (values / scores["jitter"]).min()
        print(f"| {name} | {spread} | {ratio:.2f} | {' | '.join(f'{100 * s:.0f}' for s in shares[name])} |")


if __name__ == "__main__":
    main()
