"""What the rows of a pipeline may ask for, and the name of its weights."""

import hashlib
import io
import json
from dataclasses import dataclass
from typing import Any

from ardiff.data import storage
from ardiff.diffusion.config import DiffusionConfig
from ardiff.dit import DiTConfig
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.pretrained import build_config, local_folder
from ardiff.sampling.params import ModelInfo, SamplingMode, SamplingParams, validate

FILES = ("config.json", "vae.safetensors", "dit.safetensors")


@dataclass(frozen=True, slots=True)
class SweptModel:
    """A pipeline as rows see it, without its weights."""

    uri: str
    weights: str
    """Fingerprint of its files; empty where only its configuration was read."""
    dit: DiTConfig
    num_timesteps: int
    resolution: int
    class_names: tuple[str, ...]

    @classmethod
    def load(cls, uri: str) -> "SweptModel":
        """Reads all of a pipeline, to know that it is whole. Raises CheckpointError or StorageError."""
        with local_folder(uri) as folder:
            pipeline, weights = ARDiffusionPipeline.from_pretrained(str(folder)), fingerprint_of(str(folder))
        names, side = tuple(pipeline.class_names), pipeline.vae.config.resolution
        return cls(uri, weights, pipeline.dit.config, pipeline.diffusion.num_timesteps, side, names)

    @classmethod
    def glance(cls, uri: str) -> "SweptModel | None":
        """Reads the configuration of a pipeline on this machine; None if there is none here, or it is no pipeline."""
        place = storage.join(uri, "config.json")
        if storage.is_remote(uri) or not storage.exists(place):
            return None
        try:
            config: dict[str, Any] = json.loads(storage.read_bytes(place))
            dit, diffusion = build_config(DiTConfig, config["dit"]), build_config(DiffusionConfig, config["diffusion"])
            side = int(config["vae"]["resolution"])
            return cls(uri, "", dit, diffusion.num_timesteps, side, tuple(config["class_names"]))
        except (ValueError, KeyError, TypeError):
            return None

    @property
    def info(self) -> ModelInfo:
        """What the model can sample."""
        diffusion = DiffusionConfig(num_timesteps=self.num_timesteps)
        return ModelInfo.from_configs(self.dit, diffusion, self.resolution, self.class_names)

    def refusal(
        self, mode: SamplingMode, num_frames: int, num_inference_steps: int, ar_step: int, label: int | None = None
    ) -> str | None:
        """Why the model cannot make such a video, as one sentence; None if it can."""
        params = SamplingParams(
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            ar_step=ar_step,
            mode=mode,
            class_label=label,
        )
        try:
            validate(params, self.info)
        except ValueError as error:
            return f"{self.uri}: {error}."
        return None

    def class_name(self, label: int) -> str:
        """The class's name, or its number; empty for -1, no class."""
        if label < 0:
            return ""
        return self.class_names[label] if label < len(self.class_names) else f"class {label}"


def fingerprint_of(uri: str) -> str:
    """64 hex digits that name the files of a pipeline, read piece by piece. Raises StorageError."""
    digest = hashlib.sha256()
    for name in FILES:
        place = storage.join(uri, name)
        reader = io.BufferedReader(storage.RangeReader(place, storage.size(place)), 8 * 2**20)
        while part := reader.read(8 * 2**20):
            digest.update(part)
    return digest.hexdigest()
