"""Trains variants of the quickstart's recipe with several seeds on one budget, and puts their scores into a table.

A unit, one variant with one seed, goes through the quickstart's stages from the AR-DiT on. Data, AR-VAE and latents are
shared by all variants that leave them as they are. What is complete is not run again, what was interrupted goes on, and
a unit that fails becomes a row with its reason.

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
from ray_jobs.reports.ablation import Result, Variant, place_tables, tables, write_results
from ray_jobs.runtime.cluster import ray_cluster
from ray_jobs.runtime.console import print_line
from ray_jobs.runtime.stages import StageRecord, StageRunner, read_stage, record_run, versions

CONFIG_FIRST = True


@dataclass(frozen=True, kw_only=True, slots=True)
class AblateConfig:
    """Which variants to train, and on what."""

    output: str = "runs/ablation"
    """Folder of everything, a folder a variant and below it one a seed; ``results.json``, ``results.parquet`` and
    ``ablation.png`` hold what came out."""
    quickstart: str | None = None
    """Folder of a quickstart whose data, AR-VAE and latents are complete: variants share them, and its configuration
    is the recipe. Without it they are made once below ``output``, by the shipped configuration."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of training and sampling, two at least; every variant is trained with each. The AR-VAE has its own."""
    ar_steps: tuple[int, ...] = (0, 2, 5, 20)
    """Timestep differences with which every variant is sampled and scored."""
    settings: tuple[str, ...] = ()
    """``key=value`` of the quickstart's configuration, for all variants alike: the budget."""
    variants: tuple[Variant, ...] = ()
    """The rows of the table, the one that the others are compared with first: each a ``name``, the ``question`` that
    it answers and the ``settings`` in which it differs, as in configs/quickstart/ablation.yaml."""
    table: str | None = None
    """A further Markdown file for the tables of ``ablation.md`` in the output folder. Both keep what is written around
    their marks."""

    def __post_init__(self) -> None:
        if len(self.seeds) < 2 or not self.ar_steps:
            raise ValueError("there must be at least 2 seeds, or nothing is known of their spread, and one ar_step")
        for what, values in (("seeds", self.seeds), ("ar_steps", self.ar_steps), ("variants", self.names)):
            if twice := [value for value, count in Counter(values).items() if count > 1]:
                raise ValueError(f"{what} must not hold {twice[0]} twice")

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
    """All its stages; ``output`` is the unit's folder."""
    shared: str
    """Folder of the AR-VAE and latents that it is trained on."""


def config_paths(options: dict[str, str]) -> list[Path]:
    """The shipped ablation."""
    return [find_config("quickstart/ablation.yaml")]


def run(config: AblateConfig) -> None:
    """Runs what is not done yet and writes tables and picture after every unit.

    Raises:
        ConfigError: A variant does not make a valid configuration. Nothing was run.
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
    print_line(f"[bold]{_table_places(config)[0]}[/]")
    if failed:
        names = ", ".join(f"{variant} with seed {seed}" for variant, seed in failed)
        raise ArdiffError(
            f"{len(failed)} of {len(units)} units failed: {names}. The reasons stand below the table; the same command "
            "tries them again and leaves the others as they are."
        )


def make_plan(config: AblateConfig) -> list[Unit]:
    """All units, every variant with the first seed first. Raises ConfigError naming the variant that is not valid."""
    if not config.variants:
        raise ConfigError("There are no variants: ardiff ablate configs/quickstart/ablation.yaml has those of Table 3.")
    paths, base = _recipe(config), _base(config)
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
            units.append(Unit(variant.name, seed, whole, _shared_place(config, base, whole)))
    for unit in units:
        if _budget(unit.config) != _budget(units[0].config):
            raise ConfigError(
                f"variant {unit.variant} trains another number of steps or clips than {units[0].variant}: an ablation "
                "compares on one budget, which belongs into the common settings."
            )
    return units


def _budget(config: QuickstartConfig) -> list[int]:
    """Steps and clips a step, of both models."""
    return [
        number
        for part in (config.train_vae, config.train_dit)
        for number in (part.train.num_steps, part.train.batch_size)
    ]


def _base(config: AblateConfig) -> QuickstartConfig:
    """The recipe as the quickstart has it, or as it is shipped."""
    return load_config(QuickstartConfig, _recipe(config))


def _recipe(config: AblateConfig) -> list[Path]:
    return [_recipe_of(config.quickstart)] if config.quickstart else [find_config("quickstart")]


def _recipe_of(quickstart: str) -> Path:
    """The recorded configuration of a quickstart whose latents are complete."""
    for stage in ("data", "vae", "latents"):
        if not _records(quickstart, stage):
            raise ConfigError(
                f"{quickstart} holds no complete stage '{stage}': give the folder of a quickstart that has come as far "
                "as its latents, or leave quickstart out."
            )
    return Path(quickstart) / "config.yaml"


def _shared_place(config: AblateConfig, base: QuickstartConfig, whole: QuickstartConfig) -> str:
    """The quickstart's folder for variants that leave its data, AR-VAE and latents alone, else one named by them."""
    same = _same_data(whole, base) and (whole.train_vae, whole.encode) == (base.train_vae, base.encode)
    if config.quickstart and same:
        return config.quickstart
    name = fingerprint(whole.data, whole.prepare, whole.train_vae, whole.encode)
    return storage.join(config.output, "shared", name)


def _same_data(one: QuickstartConfig, other: QuickstartConfig) -> bool:
    return (one.data, one.prepare) == (other.data, other.prepare)


def _results(config: AblateConfig, unit: Unit) -> list[Result]:
    """The unit's scores, one result an ``ar_step``; its failure is a result too."""
    try:
        return _run_unit(config, unit)
    except Exception as error:  # whatever it is, the other variants can do without this one
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
    # The controls are the same for all.
    scoring_config = replace(evaluation_stage(unit.config, root, inputs, sets), controls=False)
    scores = stages.run(evaluate_quick.run, scoring_config).results["sets"]
    seconds = stages.records[-3].seconds
    return list(_read_scores(unit, scores, seconds))


def _inputs(config: AblateConfig, unit: Unit) -> tuple[Inputs, list[StageRecord]]:
    """What the unit is trained on, made if it is not there, and the records of how."""
    whole, given = unit.config, config.quickstart
    if given and _same_data(whole, _base(config)):
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
    """The records of those stages that are complete."""
    records = [read_stage(storage.join(folder, stage)) for stage in stages]
    return [record for record in records if record is not None]


def _read_scores(unit: Unit, sets: dict[str, dict[str, float]], seconds: float) -> Iterator[Result]:
    for ar_step in unit.config.samples.ar_steps:
        found = sets[f"ar-step-{ar_step}"]
        yield Result(
            variant=unit.variant,
            seed=unit.seed,
            ar_step=ar_step,
            distance=found["distance"],
            recognised=found.get("recognised"),
            motion=found.get("motion"),
            reconstruction=sets["reconstruction"]["distance"],
            psnr=sets["reconstruction"]["psnr"],
            real=sets["real"]["distance"],
            train_seconds=seconds,
        )


def _table_places(config: AblateConfig) -> list[str]:
    return [storage.join(config.output, "ablation.md"), *([config.table] if config.table else [])]


def _write(config: AblateConfig, units: list[Unit], results: list[Result]) -> None:
    done = len({(r.variant, r.seed) for r in results})
    about: dict[str, Any] = {"config": asdict(config), "versions": versions(), "units": len(units), "measured": done}
    write_results(config.output, config.variants, results, about)
    text = tables(config.variants, results, _header(config, units, done))
    for place in _table_places(config):
        before = storage.read_bytes(place).decode() if storage.exists(place) else "# Ablation\n"
        storage.write_bytes(place, place_tables(before, text).encode())


def _header(config: AblateConfig, units: list[Unit], done: int) -> list[str]:
    """What the numbers are of."""
    first = units[0].config
    train = first.train_dit.train
    lines = [
        f"Budget of a variant and seed: {train.num_steps} steps of {train.batch_size} clips of "
        f"{first.encode.num_frames} frames; {first.generate.num_inference_steps} sampling steps, guidance "
        f"{first.generate.guidance_scale:g}, {first.evaluate.num_clips} videos scored.",
        f"Seeds {', '.join(map(str, config.seeds))} of training and sampling; one AR-VAE (seed "
        f"{first.train_vae.train.seed}) for all variants that do not change it.",
    ]
    if done < len(units):
        lines.append(f"**Incomplete:** {done} of {len(units)} units so far.")
    return lines


# --------------------------------------------------------------------------------------------------------------- plan


def describe_plan(config: AblateConfig) -> str:
    """What ``--dry-run`` shows below the configuration: the units, what is done, and how much work is left."""
    if not config.variants:
        return "no variants"
    units = make_plan(config)
    lines, left = [f"{len(units)} units of {len(config.variants)} variants and {len(config.seeds)} seeds:"], []
    for unit in units:
        complete = bool(_records(unit.config.folder, "scores"))
        left += [] if complete else [unit]
        whole = unit.config
        work = f"{whole.train_dit.train.num_steps} steps, {_evaluations(whole):,} frame evaluations"
        lines.append(f"  {unit.variant:<24} seed {unit.seed:<4} {'done' if complete else work}")
    shared = sorted({u.shared for u in left if not _records(u.shared, "latents")})
    lines += [f"data, AR-VAE and latents to be made first: {place}" for place in shared]
    steps = sum(u.config.train_dit.train.num_steps for u in left)
    evaluations = sum(_evaluations(u.config) for u in left)
    lines.append(f"left: {len(left)} units, {steps:,} training steps, {evaluations:,} frame evaluations")
    if config.quickstart and (hours := _hours(config.quickstart, left)) is not None:
        lines.append(f"about {hours:.1f} hours, as long as these took in {config.quickstart}")
    return "\n".join(lines)


def _evaluations(config: QuickstartConfig, *more: GenerateConfig) -> int:
    """Frame evaluations that the configuration's short videos, and ``more``, cost its model; guidance doubles them."""
    total, window = 0, config.train_dit.dit.num_frames
    for videos in (*short_sets(config, "", ""), *more):
        total += frame_evaluations(videos, window) * videos.num_videos
    return total


def _hours(quickstart: str, units: list[Unit]) -> float | None:
    """How long the units take if their steps, evaluations and scores take as long as the quickstart's did."""
    records = _records(quickstart, "dit", "samples", "scores")
    if len(records) < 3:
        return None
    dit, samples, scores = (record.seconds for record in records)
    base = load_config(QuickstartConfig, [_recipe_of(quickstart)])
    steps = sum(u.config.train_dit.train.num_steps for u in units) / base.train_dit.train.num_steps
    shown = _evaluations(base, long_set(base, "", ""))
    evaluations = sum(_evaluations(u.config) for u in units) / shown
    clips = sum(u.config.evaluate.num_clips for u in units) / base.evaluate.num_clips
    return (steps * dit + evaluations * samples + clips * scores) / 3600


if __name__ == "__main__":
    raise SystemExit(main(["ablate", *sys.argv[1:]]))
