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
    """Every combination of checkpoints, axes, classes, prompts and seeds is a video."""

    checkpoints: tuple[str, ...] = ("runs/dit/pipeline",)
    """Folders of trained pipelines, local or s3://."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """Sampling parameters of all videos, except those in ``axes``."""
    axes: dict[str, list[Any]] = field(default_factory=dict)
    """Sampling parameters with several values, for example {ar_step: [0, 5, 20], num_frames: [16, 128]}."""
    classes: tuple[int, ...] | None = None
    """Class indices; none for all classes of each model, or no class if a model has none or there are prompts."""
    prompts: tuple[str, ...] = ()
    """Texts that the videos show, for models with text."""
    seeds: int = 4
    """Videos per class, prompt and sweep point. Their seeds count up from ``first_seed``, the same at every point."""
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
        lists = {"checkpoints": self.checkpoints, "classes": self.classes, "prompts": self.prompts or None, **axes}
        for name, listed in lists.items():
            if listed is not None and (not listed or len(set(listed)) < len(listed)):
                raise ValueError(f"{name} must hold at least one value, and none of them twice")
        reserved = {*PER_VIDEO, *FROM_INPUT}
        if names := reserved & (axes.keys() | self.sampling.changed().keys()):
            raise ValueError(
                f"{', '.join(sorted(names))} cannot be a sampling parameter of a grid: it has classes, prompts, seeds "
                "and first_seed, and neither negative prompts, conditions nor given frames"
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
    """Videos of one model that differ in class, prompt and seed only."""

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
    texts = grid.prompts or (None,)
    points = [_point(m, params, texts, precision) for m, params in itertools.product(models, grid.combinations)]
    names = [(point.model.uri, point.name) for point in points]
    if repeated := next((name for (uri, name) in names if names.count((uri, name)) > 1), None):
        raise ConfigError(f"Two points of the grid have the same parameters, to six digits: {repeated}.")
    return points


def _point(model: SweptModel, params: SamplingParams, texts: Sequence[str | None], precision: str) -> SweepPoint:
    """``texts`` are the grid's prompts, all of which the model has to take."""
    error = None
    try:
        valid = [validate(replace(params, prompt=text), model.info) for text in texts]
        params = replace(valid[0], prompt=None)
    except ValueError as invalid:
        error = str(invalid)
    # The name depends on this point alone, so it stays the same in a larger grid.
    tags = [*params.tags(), *([precision] if precision != "fp32" else []), model.weights[:8]]
    return SweepPoint(name="-".join(filter(None, tags)), model=model, params=params, precision=precision, error=error)


def subjects(grid: GridConfig, model: SweptModel) -> list[tuple[int | None, str | None]]:
    """The class and the prompt of each video of a point and seed; None is no class, and no prompt."""
    all_classes = () if grid.prompts else range(model.info.num_classes)
    classes: list[int | None] = list(all_classes if grid.classes is None else grid.classes) or [None]
    return list(itertools.product(classes, grid.prompts or [None]))


def point_specs(grid: GridConfig, point: SweepPoint, output: OutputSettings) -> list[VideoSpec]:
    """The specs of a sweep point, class by class and prompt by prompt."""
    specs = []
    for (label, prompt), seed in itertools.product(subjects(grid, point.model), range(grid.seeds)):
        params = replace(point.params, class_label=label, prompt=prompt, seed=grid.first_seed + seed)
        kind = "-".join(SamplingParams(class_label=label, prompt=prompt).tags()) or "no-class"
        name = f"{point.name}/{kind}-seed-{params.seed}-{spec_id(point.model.weights, params, point.precision)}"
        specs.append(make_spec(point.model, params, point.precision, output, name, point.name))
    return specs
