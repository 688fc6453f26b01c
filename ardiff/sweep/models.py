"""What the rows of a pipeline may ask for, and the name of its weights."""

import hashlib
import io
import json
from dataclasses import dataclass
from typing import Any

from ardiff.data import storage
from ardiff.diffusion.ar_step import check_ar_step
from ardiff.diffusion.config import DiffusionConfig
from ardiff.dit import DiTConfig
from ardiff.models import AnyDiTConfig
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.pretrained import build_config, local_folder
from ardiff.sampling import why_not_cached

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
            dit = build_config(AnyDiTConfig, config["dit"])
            diffusion = build_config(DiffusionConfig, config["diffusion"])
            side = int(config["vae"]["resolution"])
            return cls(uri, "", dit, diffusion.num_timesteps, side, tuple(config["class_names"]))
        except (ValueError, KeyError, TypeError):
            return None

    def refusal(
        self, executor: str, num_frames: int, num_inference_steps: int, ar_step: int, label: int | None = None
    ) -> str | None:
        """Why the model cannot make such a video, as one sentence; None if it can."""
        if executor != "full" and (reason := why_not_cached(self.dit)) is not None:
            return f"executor={executor} cannot sample {self.uri}: {reason}."
        banded = self.dit.attention_window is not None and self.dit.positions == "rotary"
        if executor == "rolling" and num_frames > self.dit.num_frames and not banded:
            return "executor=rolling needs a model trained with dit.attention_window and dit.positions=rotary."
        window = None if executor == "rolling" else self.dit.num_frames
        try:
            check_ar_step(num_frames, num_inference_steps, ar_step, window)
        except ValueError as error:
            return f"{error}"
        if num_inference_steps > self.num_timesteps:
            return f"num_inference_steps must be at most {self.num_timesteps}."
        classes = self.dit.num_classes
        if label is not None and not 0 <= label < classes:
            valid = f"has classes 0..{classes - 1}" if classes else "has no classes"
            return f"class_label {label} is out of range: the model {valid}."
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
