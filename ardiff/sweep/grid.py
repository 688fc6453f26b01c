"""A grid of settings as rows: one per video, each with an id that names everything its frames depend on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ardiff.config import fingerprint
from ardiff.data import storage
from ardiff.data.encode import VideoCodec
from ardiff.errors import ConfigError
from ardiff.sampling.cost import frame_evaluations, sequential_passes
from ardiff.sampling.params import SamplingMode, SamplingParams
from ardiff.sweep.models import SweptModel
from ardiff.sweep.rows import SUFFIXES, VideoRow


@dataclass(frozen=True, kw_only=True, slots=True)
class GridConfig:
    """Every combination of these is a video."""

    checkpoints: tuple[str, ...] = ("runs/dit/pipeline",)
    """Folders of trained pipelines, local or s3://."""
    ar_steps: tuple[int, ...] = (5,)
    """The paper's timestep difference: 0 is synchronous, ``num_inference_steps`` auto-regressive."""
    num_frames: tuple[int, ...] = (16,)
    """Frames of a video."""
    num_inference_steps: tuple[int, ...] = (50,)
    """Sampling steps per frame."""
    guidance_scales: tuple[float, ...] = (1.0,)
    """Classifier-free guidance; 1 is none."""
    classes: tuple[int, ...] | None = None
    """Class indices; without them all classes of each model, or none of a model without classes."""
    seeds: int = 4
    """Videos of each class in a cell; their seeds count up from ``first_seed``, the same in every cell."""
    first_seed: int = 0
    """Seed of the first video."""

    def __post_init__(self) -> None:
        for name in ("checkpoints", "ar_steps", "num_frames", "num_inference_steps", "guidance_scales", "classes"):
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) < len(values)):
                raise ValueError(f"{name} must name at least one value, and none of them twice")
        if self.seeds < 1:
            raise ValueError("seeds must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """Rows that differ in class and seed only."""

    name: str
    model: SweptModel
    num_frames: int
    ar_step: int
    num_inference_steps: int
    guidance_scale: float
    mode: SamplingMode
    precision: str

    @property
    def evaluations(self) -> int:
        """Evaluations of a frame that one of its videos takes, both branches of guidance counted."""
        return frame_evaluations(self.params, self.model.dit.num_frames)

    @property
    def passes(self) -> int:
        """Passes of the model that must follow each other."""
        return sequential_passes(self.params)

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(
            num_frames=self.num_frames,
            num_inference_steps=self.num_inference_steps,
            ar_step=self.ar_step,
            guidance_scale=self.guidance_scale,
            mode=self.mode,
        )

    def refusal(self, label: int | None = None) -> str | None:
        """Why its videos, or those of a class, cannot be made; None if they can."""
        return self.model.refusal(self.mode, self.num_frames, self.num_inference_steps, self.ar_step, label)


def cells_of(grid: GridConfig, models: Sequence[SweptModel], mode: SamplingMode, precision: str) -> list[Cell]:
    """The cells of a grid, checkpoint by checkpoint. Raises ConfigError if two models, or two cells, are the same."""
    weights = [model.weights for model in models if model.weights]
    if len(set(weights)) < len(weights):
        raise ConfigError("Two of grid.checkpoints are the same model: name each of them once.")
    if len({f"{guidance:g}" for guidance in grid.guidance_scales}) < len(grid.guidance_scales):
        raise ConfigError("Two of grid.guidance_scales are the same to six digits: leave one out.")
    settings = itertools.product(grid.num_frames, grid.num_inference_steps, grid.guidance_scales, grid.ar_steps)
    return [
        Cell(
            name=_cell_name(model.weights, frames, ar_step, steps, guidance, mode, precision),
            model=model,
            num_frames=frames,
            ar_step=ar_step,
            num_inference_steps=steps,
            guidance_scale=guidance,
            mode=mode,
            precision=precision,
        )
        for model, (frames, steps, guidance, ar_step) in itertools.product(models, list(settings))
    ]


def _cell_name(weights: str, frames: int, ar_step: int, steps: int, guidance: float, mode: str, precision: str) -> str:
    """A name that depends on nothing but the cell, so that it stays the same in a larger grid."""
    parts = [f"ar{ar_step}", f"f{frames}", f"s{steps}", f"g{guidance:g}"]
    parts += [mode] if mode != "window" else []
    parts += [precision] if precision != "fp32" else []
    return "-".join([*parts, weights[:8]])


def labels_of(grid: GridConfig, model: SweptModel) -> list[int]:
    """The classes of a cell's rows; -1 for none."""
    if grid.classes is not None:
        return list(grid.classes)
    return list(range(model.dit.num_classes)) or [-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Storing:
    """Where the videos of a grid go, and as what."""

    output: str
    fps: float
    codec: VideoCodec
    crf: int
    latents: bool
    """Whether latents are kept beside them."""


def rows_of(grid: GridConfig, cell: Cell, storing: Storing) -> list[VideoRow]:
    """The rows of a cell, class by class."""
    root = storage.absolute(storing.output)
    rows = []
    for label, seed in itertools.product(labels_of(grid, cell.model), range(grid.seeds)):
        row = VideoRow(
            id="",
            cell=cell.name,
            checkpoint=storage.absolute(cell.model.uri),
            weights=cell.model.weights,
            num_frames=cell.num_frames,
            ar_step=cell.ar_step,
            num_inference_steps=cell.num_inference_steps,
            guidance_scale=cell.guidance_scale,
            mode=cell.mode,
            precision=cell.precision,
            label=label,
            class_name=cell.model.class_name(label),
            seed=grid.first_seed + seed,
            fps=storing.fps,
            codec=storing.codec,
            crf=storing.crf,
            uri="",
            latents="",
            record="",
        )
        row = replace(row, id=row_id(row))
        kind = f"class-{label}" if label >= 0 else "no-class"
        name = f"{cell.name}/{kind}-seed-{row.seed}-{row.id}"
        rows.append(
            replace(
                row,
                uri=storage.join(root, "videos", f"{name}.{SUFFIXES[storing.codec]}"),
                latents=storage.join(root, "latents", f"{name}.safetensors") if storing.latents else "",
                record=storage.join(root, "records", f"{name}.json"),
            )
        )
    return rows


def row_id(row: VideoRow) -> str:
    """16 hex digits that name all that a row's frames depend on, up to the rounding of another kind of device."""
    sampling = [row.num_frames, row.ar_step, row.num_inference_steps, row.mode, row.precision]
    return fingerprint(row.weights, sampling, float(row.guidance_scale), [row.label, row.seed])
