"""A grid of sampling parameters, and the sweep points and video specs that it expands to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ardiff.config import build
from ardiff.errors import ConfigError
from ardiff.sampling.cost import frame_evaluations, sequential_passes
from ardiff.sampling.params import FROM_INPUT, PER_VIDEO, SamplingParams, validate
from ardiff.sweep.models import SweptModel
from ardiff.sweep.specs import OutputSettings, VideoSpec, make_spec, spec_id


@dataclass(frozen=True, kw_only=True, slots=True)
class GridConfig:
    """Every combination of checkpoints, axes, classes and seeds is a video."""

    checkpoints: tuple[str, ...] = ("runs/dit/pipeline",)
    """Folders of trained pipelines, local or s3://."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """Sampling parameters of all videos, except those in ``axes``."""
    axes: dict[str, list[Any]] = field(default_factory=dict)
    """Sampling parameters with several values, for example {ar_step: [0, 5, 20], num_frames: [16, 128]}."""
    classes: tuple[int, ...] | None = None
    """Class indices; none for all classes of each model, or no class if a model has none."""
    seeds: int = 4
    """Videos per class and sweep point. Their seeds count up from ``first_seed``, the same at every point."""
    first_seed: int = 0
    """Seed of the first video."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError("seeds must be at least 1")
        axes: dict[str, list[Any]] = {}
        for name, values in self.axes.items():
            if not isinstance(values, list | tuple):
                raise ConfigError(f"'grid.axes.{name}' must be a list of values, not {values!r}.")
            params = [build(SamplingParams, {name: value}, "grid.axes") for value in values]
            axes[name] = [getattr(p, name) for p in params]
        for name, listed in {"checkpoints": self.checkpoints, "classes": self.classes, **axes}.items():
            if listed is not None and (not listed or len(set(listed)) < len(listed)):
                raise ValueError(f"{name} must hold at least one value, and none of them twice")
        reserved = {*PER_VIDEO, *FROM_INPUT}
        if names := reserved & (axes.keys() | self.sampling.changed().keys()):
            raise ValueError(
                f"{', '.join(sorted(names))} cannot be a sampling parameter of a grid: classes, seeds and first_seed "
                "set classes and seeds, and a sweep has neither prompts nor given frames"
            )
        object.__setattr__(self, "axes", axes)

    @property
    def combinations(self) -> list[SamplingParams]:
        """The sampling parameters of each point; the last axis varies fastest."""
        return [
            replace(self.sampling, **dict(zip(self.axes, values, strict=True)))
            for values in itertools.product(*self.axes.values())
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPoint:
    """Videos of one model that differ in class and seed only."""

    name: str
    model: SweptModel
    params: SamplingParams
    precision: str
    error: str | None
    """Why the model cannot sample these videos; None if it can."""

    @property
    def evaluations(self) -> int:
        """Evaluations of a frame that one video takes, both branches of guidance counted."""
        return frame_evaluations(self.params, self.model.info.num_frames)

    @property
    def passes(self) -> int:
        """Passes of the model that must follow each other."""
        return sequential_passes(self.params)


def sweep_points(grid: GridConfig, models: Sequence[SweptModel], precision: str) -> list[SweepPoint]:
    """The points of a grid, model by model. Raises ConfigError if two models or two points are the same."""
    weights = [model.weights for model in models if model.weights]
    if len(set(weights)) < len(weights):
        raise ConfigError("Two of grid.checkpoints are the same model: name each of them once.")
    points = [_point(model, params, precision) for model, params in itertools.product(models, grid.combinations)]
    names = [(point.model.uri, point.name) for point in points]
    if repeated := next((name for (uri, name) in names if names.count((uri, name)) > 1), None):
        raise ConfigError(f"Two points of the grid have the same parameters, to six digits: {repeated}.")
    return points


def _point(model: SweptModel, params: SamplingParams, precision: str) -> SweepPoint:
    error = None
    try:
        params = validate(params, model.info)
    except ValueError as invalid:
        error = str(invalid)
    # The name depends on this point alone, so it stays the same in a larger grid.
    tags = [*params.tags(), *([precision] if precision != "fp32" else []), model.weights[:8]]
    return SweepPoint(name="-".join(filter(None, tags)), model=model, params=params, precision=precision, error=error)


def class_labels(grid: GridConfig, model: SweptModel) -> list[int | None]:
    """The class of each video of a point and seed; None is no class."""
    return list(range(model.info.num_classes) if grid.classes is None else grid.classes) or [None]


def point_specs(grid: GridConfig, point: SweepPoint, output: OutputSettings) -> list[VideoSpec]:
    """The specs of a sweep point, class by class."""
    specs = []
    for label, seed in itertools.product(class_labels(grid, point.model), range(grid.seeds)):
        params = replace(point.params, class_label=label, seed=grid.first_seed + seed)
        kind = "no-class" if label is None else f"class-{label}"
        name = f"{point.name}/{kind}-seed-{params.seed}-{spec_id(point.model.weights, params, point.precision)}"
        specs.append(make_spec(point.model, params, point.precision, output, name, point.name))
    return specs
