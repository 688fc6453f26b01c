"""The quick evaluation up to its scores: the sets of clips and their measurement on actors."""

import hashlib
import io
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import ray
import ray.data
import torch

from ardiff.data import storage
from ardiff.errors import ConfigError
from ardiff.metrics.controls import CONTROLS
from ardiff.metrics.extractors import FeatureExtractor
from ardiff.metrics.networks.i3d import MIN_FRAMES
from ardiff.metrics.networks.random3d import RandomVideoFeatures
from ardiff.metrics.pairs.psnr import psnr
from ardiff.metrics.prompts import expected_class, prompt_measures
from ardiff.metrics.registry import State
from ardiff.metrics.sets.fvd import STYLEGANV as FVD
from ardiff.metrics.shapes import SHAPE_MEASURES, shape_measures
from ardiff.metrics.tracking import track
from ardiff.metrics.weights import cached, find_state
from ardiff.pretrained import load_autoencoder
from ardiff.randomness import numpy_generator
from ray_jobs.evaluation.config import QuickConfig
from ray_jobs.evaluation.datasets import (
    Clip,
    Dataset,
    common_size,
    generated_clips,
    open_generated,
    open_videos,
    two_draws,
)
from ray_jobs.evaluation.frames import read_frames
from ray_jobs.evaluation.reconstruction import NAME as RECONSTRUCTION
from ray_jobs.evaluation.reconstruction import reconstruct
from ray_jobs.runtime.progress import remote_progress, report_errors

REFERENCE, REAL = "reference", "real"
BY_CONDITION = "by_condition.csv"
"""The file with the means by prompt or class beside the scores."""
FVD_CONTROL = "shuffled frames"
"""The only control of FVD: I3D takes seconds per clip."""
Sets = dict[str, list[Clip]]
"""The clips of each set by its name."""
I3D = tuple[State, str]
"""The weights of I3D and their sha256."""


def find_i3d(config: QuickConfig) -> I3D | None:
    """The weights of I3D if they are in the cache and the clips are long enough for FVD."""
    return find_state("i3d") if _has_i3d(config) else None


def _has_i3d(config: QuickConfig) -> bool:
    return config.i3d_clips > 0 and config.num_frames >= MIN_FRAMES and cached("i3d").exists()


def is_outdated(config: QuickConfig, scores: dict[str, Any]) -> bool:
    """Whether scores should be computed again, from the content of their ``scores.json``.

    The weights of I3D are in the cache now and the scores have no FVD, an earlier version computed the distance, or the
    measures of shapes or their means by prompt or class are missing.
    """
    if not storage.exists(storage.join(config.output, BY_CONDITION)):
        return True
    extractors, real = scores["extractors"], scores["sets"][REAL]
    lacks_fvd = "fvd" not in extractors and _has_i3d(config)
    lacks_shapes = config.shapes and not real.keys() >= set(SHAPE_MEASURES)
    return lacks_fvd or lacks_shapes or extractors["distance"] != RandomVideoFeatures(config.extractor_seed).name


# -------------------------------------------------------------------------------------------------------------- clips


def clip_sets(config: QuickConfig, datasets: list[Dataset]) -> Sets:
    """The clips of every set: the reference, as many other real clips, intact and damaged, and the generated ones."""
    real, *generated = datasets
    count = config.num_clips
    reference, others = two_draws(open_videos(real, config.split, config.span, config.fps).records, count, config)
    derived = [REAL, *([RECONSTRUCTION] if config.vae else []), *(CONTROLS if config.controls else ())]
    sets = {REFERENCE: reference, **dict.fromkeys(derived, others)}
    for dataset in generated:
        if (name := dataset.name) in sets:
            raise ConfigError(f"Two sets are called '{name}': keep generated videos in folders of different names.")
        sets[name] = generated_clips(open_generated(dataset, config.num_frames), config)
    resolution_of(config, sets)
    return sets


def resolution_of(config: QuickConfig, sets: Sets) -> str:
    """Height x width of all videos. Raises ConfigError if they differ and no ``resolution`` is given."""
    return common_size([clip.video for clips in sets.values() for clip in clips], config.resolution)


def has_fvd(name: str) -> bool:
    """Whether FVD is computed for the set."""
    return name not in CONTROLS or name == FVD_CONTROL


# -------------------------------------------------------------------------------------------------------- measurement


def measure(config: QuickConfig, sets: Sets, i3d: I3D | None) -> pd.DataFrame:
    """One row per clip: set, index, features and other measurements."""
    size = config.batch_size
    other_prompts = {name: _shuffled_prompts(config, clips) for name, clips in sets.items()}
    tasks = [
        {
            "set": name,
            "first": first,
            "clips": [asdict(clip) for clip in clips[first : first + size]],
            "other_prompts": other_prompts[name][first : first + size],
        }
        for name, clips in sets.items()
        for first in range(0, len(clips), size)
    ]
    total = sum(len(clips) for clips in sets.values())
    with remote_progress("scoring", total, "clip") as progress:
        rows = (
            ray.data.from_items(tasks, override_num_blocks=len(tasks))
            .flat_map(
                _Actor,
                fn_constructor_args=(config, None if i3d is None else ray.put(i3d[0]), progress),
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=config.max_actors),
                num_cpus=1,
            )
            .take_all()
        )
    # Sorted, so that the rows do not depend on the order in which tasks end.
    return pd.DataFrame(rows).sort_values(["set", "index"], ignore_index=True)


def _shuffled_prompts(config: QuickConfig, clips: list[Clip]) -> list[str]:
    """For each clip the first caption of another one, in random order; empty for videos without captions."""
    order = numpy_generator("shuffled prompts", config.seed).permutation(len(clips))
    other = {int(index): int(following) for index, following in zip(order, np.roll(order, 1), strict=True)}
    return [next(iter(clips[other[index]].video.captions), "") for index in range(len(clips))]


class _Actor:
    """A Ray actor that decodes clips, damages or reconstructs those of the derived sets, and measures them."""

    def __init__(self, config: QuickConfig, i3d_state: Any, progress: Any) -> None:
        torch.set_num_threads(1)
        self.config, self.progress = config, progress
        self.features = RandomVideoFeatures(config.extractor_seed)
        self.vae = load_autoencoder(config.vae) if config.vae else None
        self.i3d = None if i3d_state is None else FeatureExtractor(FVD, ray.get(i3d_state), torch.device("cpu"))

    @torch.no_grad()
    def __call__(self, task: dict[str, Any]) -> list[dict[str, Any]]:
        config, name = self.config, task["set"]
        with report_errors(self.progress):
            clips = [self._decode(clip) for clip in task["clips"]]
        original = np.stack(clips)  # (n, F, H, W, 3)
        videos = self._derive(name, original, int(task["first"]))
        features = self.features(torch.from_numpy(videos)).numpy()  # (n, D)
        rows = []
        for i, clip in enumerate(task["clips"]):
            uri, index = clip["video"]["uri"], int(task["first"]) + i
            row = {"set": name, "index": index, "uri": uri, "start": int(clip["start"])}
            row["condition"] = next(iter(clip["video"]["captions"]), clip["video"]["class_name"])
            row |= {"sha256": hashlib.sha256(videos[i].tobytes()).hexdigest(), "features": features[i].tolist()}
            if self.i3d is not None and has_fvd(name) and index < config.i3d_clips:
                row["i3d"] = self.i3d(videos[i : i + 1])[0, 0].tolist()
            if name == RECONSTRUCTION:
                row["psnr"] = psnr(original[i], videos[i])
            if config.shapes:
                row |= self._shape_measures(videos[i], clip["video"], task["other_prompts"][i])
            rows.append(row)
        self.progress.add.remote(len(rows))
        return rows

    def _shape_measures(self, video: np.ndarray, record: dict[str, Any], other_prompt: str) -> dict[str, float]:
        """Measures of a synthetic video: by its class, or by the first of its captions."""
        tracking = track(video)
        if not record["captions"]:
            return shape_measures(tracking, record["label"])
        prompt = record["captions"][0]
        return shape_measures(tracking, expected_class(prompt)) | prompt_measures(tracking, prompt, other_prompt)

    def _decode(self, clip: dict[str, Any]) -> np.ndarray:
        return read_frames(clip, "video", self.config.num_frames, self.config.resolution)

    def _derive(self, name: str, videos: np.ndarray, first: int) -> np.ndarray:
        """The videos of the set ``name``, from real ones if it is a derived set."""
        if name == RECONSTRUCTION:
            assert self.vae is not None
            return reconstruct(self.vae, videos)
        if name in CONTROLS:
            return CONTROLS[name](videos, numpy_generator("control", self.config.seed, name, first))
        return videos


def to_parquet(frame: pd.DataFrame) -> bytes:
    """The measurements as a Parquet file."""
    buffer = io.BytesIO()
    frame.to_parquet(buffer)
    return buffer.getvalue()
