"""Trains variants of the quickstart with several seeds on the same budget, and tabulates their scores.

A unit is one variant with one seed. It runs the quickstart's stages from the AR-DiT's training on. Variants that change
neither data nor AR-VAE nor latents share them. The same command skips complete units and resumes an interrupted one. A
unit that fails becomes a row with the reason.

    python -m ray_jobs.ablate configs/quickstart/ablation.yaml quickstart=runs/quickstart
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from ardiff.cli import main
from ardiff.config import find_config, fingerprint, load_config
from ardiff.data import storage
from ardiff.errors import ArdiffError, ConfigError
from ardiff.sampling.cost import frame_evaluations
from ray_jobs import evaluate_quick, generate, prepare
from ray_jobs.generation.config import GenerateConfig, VideoSets
from ray_jobs.quickstart import (
    Inputs,
    QuickstartConfig,
    data_stage,
    encode_data,
    evaluation_stage,
    long_set,
    short_sets,
    train_pipeline,
)
from ray_jobs.reports.ablation import Result, Variant, insert_tables, tables, write_results
from ray_jobs.runtime.cluster import ray_cluster
from ray_jobs.runtime.console import print_line
from ray_jobs.runtime.stages import StageRecord, StageRunner, read_stage, record_run, versions

CONFIG_FIRST = True


@dataclass(frozen=True, kw_only=True, slots=True)
class AblateConfig:
    """Which variants to train, and their budget."""

    output: str = "runs/ablation"
    """Output folder: ``results.json``, ``results.parquet``, ``ablation.png``, and a folder per variant and seed."""
    quickstart: str | None = None
    """Folder of a quickstart with complete data, AR-VAE and latents. The variants share them, and its configuration is
    the base configuration. Without it, the shipped configuration makes them once below ``output``."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of training and sampling, at least two. Every variant is trained with each. The AR-VAE has its own seed."""
    ar_steps: tuple[int, ...] = (0, 2, 5, 20)
    """Values of ``ar_step`` at which every variant is sampled and scored."""
    settings: tuple[str, ...] = ()
    """``key=value`` settings of the quickstart for all variants, such as the budget."""
    variants: tuple[Variant, ...] = ()
    """The variants, the baseline of the comparison first. Each has a ``name``, the ``question`` that it answers and the
    ``settings`` that it changes, as in configs/quickstart/ablation.yaml."""
    table: str | None = None
    """A second Markdown file for the tables. The first is ``ablation.md`` in the output folder. Text around the markers
    stays."""

    def __post_init__(self) -> None:
        if len(self.seeds) < 2 or not self.ar_steps:
            raise ValueError("give at least 2 seeds, to estimate their spread, and at least one ar_step")
        for name, values in (("seeds", self.seeds), ("ar_steps", self.ar_steps), ("variants", self.names)):
            if repeated := [value for value, count in Counter(values).items() if count > 1]:
                raise ValueError(f"{name} must not contain {repeated[0]} twice")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the variants."""
        return tuple(variant.name for variant in self.variants)


@dataclass(frozen=True, slots=True)
class Unit:
    """One variant with one seed."""

    variant: str
    seed: int
    config: QuickstartConfig
    """The settings of all stages. ``output`` is the unit's folder."""
    shared: str
    """Folder of the AR-VAE and latents."""


def config_paths(options: dict[str, str]) -> list[Path]:
    """The shipped ablation."""
    return [find_config("quickstart/ablation.yaml")]


def run(config: AblateConfig) -> None:
    """Runs the incomplete units, and writes tables and picture after every unit.

    Raises:
        ConfigError: A variant has no valid configuration. Nothing was run.
        ArdiffError: Units failed. The others are complete.
    """
    units = make_plan(config)
    results: list[Result] = []
    with ray_cluster():
        for number, unit in enumerate(units):
            print_line(f"[bold]{unit.variant}, seed {unit.seed}[/] ({number + 1} of {len(units)})")
            results += _results(config, unit)
            _write(config, units, results)
    failed = sorted({(r.variant, r.seed) for r in results if r.reason})
    print_line(f"[bold]{_table_files(config)[0]}[/]")
    if failed:
        names = ", ".join(f"{variant} with seed {seed}" for variant, seed in failed)
        raise ArdiffError(
            f"{len(failed)} of {len(units)} units failed: {names}. The reasons are below the table. The same command "
            "repeats only these units."
        )


def make_plan(config: AblateConfig) -> list[Unit]:
    """All units, seed by seed. Raises ConfigError with the name of a variant that has no valid configuration."""
    if not config.variants:
        raise ConfigError("There are no variants: configs/quickstart/ablation.yaml has those of the paper's Table 3.")
    paths, base = _base_paths(config), _base_config(config)
    samples = f"samples.ar_steps={list(config.ar_steps)}"
    units = []
    for seed in config.seeds:
        for variant in config.variants:
            try:
                of_seed = [f"train_dit.train.seed={seed}", f"generate.seed={seed * base.generate.num_videos}"]
                settings = [samples, *config.settings, *variant.settings, *of_seed]
                whole = load_config(QuickstartConfig, paths, settings)
            except ConfigError as error:
                raise ConfigError(f"variant {variant.name}: {error}") from error
            whole = replace(whole, output=storage.join(config.output, variant.name, f"seed-{seed}"))
            units.append(Unit(variant.name, seed, whole, _shared_folder(config, base, whole)))
    for unit in units:
        if _budget(unit.config) != _budget(units[0].config):
            raise ConfigError(
                f"variant {unit.variant} trains with another number of steps or clips than {units[0].variant}: an "
                "ablation compares on one budget. Put it into the common settings."
            )
    return units


def _budget(config: QuickstartConfig) -> list[int]:
    """Steps, and clips per step, of both models."""
    return [
        number
        for part in (config.train_vae, config.train_dit)
        for number in (part.train.num_steps, part.train.batch_size)
    ]


def _base_config(config: AblateConfig) -> QuickstartConfig:
    """The configuration of the quickstart, or the shipped one."""
    return load_config(QuickstartConfig, _base_paths(config))


def _base_paths(config: AblateConfig) -> list[Path]:
    return [_recorded_config(config.quickstart)] if config.quickstart else [find_config("quickstart")]


def _recorded_config(quickstart: str) -> Path:
    """The recorded configuration of a quickstart. Raises ConfigError if its latents are not complete."""
    for stage in ("data", "vae", "latents"):
        if not _records(quickstart, stage):
            raise ConfigError(
                f"{quickstart} has no complete stage '{stage}': give the folder of a quickstart with complete latents, "
                "or leave out quickstart."
            )
    return Path(quickstart) / "config.yaml"


def _shared_folder(config: AblateConfig, base: QuickstartConfig, whole: QuickstartConfig) -> str:
    """The quickstart's folder if its data, AR-VAE and latents fit, else a folder named by their settings."""
    same = _same_data(whole, base) and (whole.train_vae, whole.encode) == (base.train_vae, base.encode)
    if config.quickstart and same:
        return config.quickstart
    name = fingerprint(whole.data, whole.prepare, whole.train_vae, whole.encode)
    return storage.join(config.output, "shared", name)


def _same_data(one: QuickstartConfig, other: QuickstartConfig) -> bool:
    return (one.data, one.prepare) == (other.data, other.prepare)


def _results(config: AblateConfig, unit: Unit) -> list[Result]:
    """The unit's scores, one result per ``ar_step``. A failure is a result too."""
    try:
        return _run_unit(config, unit)
    except Exception as error:  # an error of one unit must not stop the others
        reason = " ".join(str(error).split()) if isinstance(error, ArdiffError) else f"{type(error).__name__}: {error}"
        reason = reason.splitlines()[0] if reason else type(error).__name__
        print_line(f"[red]✗[/] {unit.variant}, seed {unit.seed}: {escape(reason)}")
        return [Result(variant=unit.variant, seed=unit.seed, ar_step=s, reason=reason) for s in config.ar_steps]


def _run_unit(config: AblateConfig, unit: Unit) -> list[Result]:
    root = unit.config.folder
    inputs, before = _inputs(config, unit)
    stages = StageRunner(functools.partial(record_run, root, unit.config), before)
    pipeline = train_pipeline(unit.config, root, inputs, stages)
    sets = short_sets(unit.config, root, pipeline)
    stages.run(generate.run_sets, VideoSets(output=f"{root}/samples", sets=tuple(sets)))
    # The controls are the same for all units.
    scoring_config = replace(evaluation_stage(unit.config, root, inputs, sets), controls=False)
    scores = stages.run(evaluate_quick.run, scoring_config).results["sets"]
    seconds = stages.records[-3].seconds
    return list(_read_scores(unit, scores, seconds))


def _inputs(config: AblateConfig, unit: Unit) -> tuple[Inputs, list[StageRecord]]:
    """Makes the unit's training inputs unless they are complete. Returns them and the records of their stages."""
    whole, given = unit.config, config.quickstart
    if given and _same_data(whole, _base_config(config)):
        data = data_stage(whole, storage.join(given, "data"))
        stages = StageRunner(functools.partial(record_run, unit.shared, whole), _records(given, "data"))
    else:
        data = data_stage(
            whole, storage.join(config.output, "shared", f"data-{fingerprint(whole.data, whole.prepare)}")
        )
        stages = StageRunner(functools.partial(record_run, unit.shared, whole))
        stages.run(prepare.run, data)
    if unit.shared != given:
        return encode_data(whole, unit.shared, data, stages), stages.records
    records = _records(given, "data", "vae", "latents")
    vae = replace(whole.train_vae, output=storage.join(given, "vae"))
    return Inputs(data.manifest, vae.model, records[-1].results["folder"], data.source is None), records


def _records(folder: str, *stages: str) -> list[StageRecord]:
    """The records of the complete stages."""
    records = [read_stage(storage.join(folder, stage)) for stage in stages]
    return [record for record in records if record is not None]


def _read_scores(unit: Unit, sets: dict[str, dict[str, float]], seconds: float) -> Iterator[Result]:
    for ar_step in unit.config.samples.ar_steps:
        scores = sets[f"ar-step-{ar_step}"]
        yield Result(
            variant=unit.variant,
            seed=unit.seed,
            ar_step=ar_step,
            distance=scores["distance"],
            frame_identity=scores.get("frame identity"),
            neighbours_alike=scores.get("neighbours alike"),
            motion=scores.get("motion"),
            recognised=scores.get("recognised"),
            reconstruction=sets["reconstruction"]["distance"],
            psnr=sets["reconstruction"]["psnr"],
            real=sets["real"]["distance"],
            train_seconds=seconds,
        )


def _table_files(config: AblateConfig) -> list[str]:
    return [storage.join(config.output, "ablation.md"), *([config.table] if config.table else [])]


def _write(config: AblateConfig, units: list[Unit], results: list[Result]) -> None:
    done = len({(r.variant, r.seed) for r in results})
    about: dict[str, Any] = {"config": asdict(config), "versions": versions(), "units": len(units), "measured": done}
    write_results(config.output, config.variants, results, about)
    text = tables(config.variants, results, _header(config, units, done))
    for file in _table_files(config):
        before = storage.read_bytes(file).decode() if storage.exists(file) else "# Ablation\n"
        storage.write_bytes(file, insert_tables(before, text).encode())


def _header(config: AblateConfig, units: list[Unit], done: int) -> list[str]:
    """The budget and the seeds, as lines above the tables."""
    first = units[0].config
    train = first.train_dit.train
    lines = [
        f"Budget per variant and seed: {train.num_steps} steps of {train.batch_size} clips of "
        f"{first.encode.num_frames} frames; {first.generate.num_inference_steps} sampling steps, guidance "
        f"{first.generate.guidance_scale:g}, {first.evaluate.num_clips} videos scored.",
        f"Seeds {', '.join(map(str, config.seeds))} of training and sampling. One AR-VAE (seed "
        f"{first.train_vae.train.seed}) for all variants that do not change it.",
    ]
    if done < len(units):
        lines.append(f"**Incomplete:** {done} of {len(units)} units so far.")
    return lines


# --------------------------------------------------------------------------------------------------------------- plan


def describe_plan(config: AblateConfig) -> str:
    """The text of ``--dry-run`` below the configuration: the units, which are complete, and the remaining work."""
    if not config.variants:
        return "no variants"
    units = make_plan(config)
    lines, remaining = [f"{len(units)} units of {len(config.variants)} variants and {len(config.seeds)} seeds:"], []
    for unit in units:
        complete = bool(_records(unit.config.folder, "scores"))
        remaining += [] if complete else [unit]
        whole = unit.config
        work = f"{whole.train_dit.train.num_steps} steps, {_evaluations(whole):,} frame evaluations"
        lines.append(f"  {unit.variant:<24} seed {unit.seed:<4} {'done' if complete else work}")
    shared = sorted({u.shared for u in remaining if not _records(u.shared, "latents")})
    lines += [f"data, AR-VAE and latents to make first: {folder}" for folder in shared]
    steps = sum(u.config.train_dit.train.num_steps for u in remaining)
    evaluations = sum(_evaluations(u.config) for u in remaining)
    lines.append(f"remaining: {len(remaining)} units, {steps:,} training steps, {evaluations:,} frame evaluations")
    if config.quickstart and (hours := _hours(config.quickstart, remaining)) is not None:
        lines.append(f"about {hours:.1f} hours at the speed of {config.quickstart}")
    return "\n".join(lines)


def _evaluations(config: QuickstartConfig, *more: GenerateConfig) -> int:
    """Frame evaluations of the model for the configuration's short videos and ``more``."""
    total, window = 0, config.train_dit.dit.num_frames
    for videos in (*short_sets(config, "", ""), *more):
        total += frame_evaluations(videos, window) * videos.num_videos
    return total


def _hours(quickstart: str, units: list[Unit]) -> float | None:
    """The time of the units if a step, an evaluation and a scored clip take as long as in the quickstart."""
    records = _records(quickstart, "dit", "samples", "scores")
    if len(records) < 3:
        return None
    dit, samples, scores = (record.seconds for record in records)
    base = load_config(QuickstartConfig, [_recorded_config(quickstart)])
    steps = sum(u.config.train_dit.train.num_steps for u in units) / base.train_dit.train.num_steps
    base_evaluations = _evaluations(base, long_set(base, "", ""))
    evaluations = sum(_evaluations(u.config) for u in units) / base_evaluations
    clips = sum(u.config.evaluate.num_clips for u in units) / base.evaluate.num_clips
    return (steps * dit + evaluations * samples + clips * scores) / 3600


if __name__ == "__main__":
    raise SystemExit(main(["ablate", *sys.argv[1:]]))
