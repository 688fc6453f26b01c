"""The quickstart's report: stages, curves, videos and scores."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ardiff.config import to_yaml
from ardiff.data.clips import read_clip
from ardiff.data.encode import contact_sheet, encode_video, enlarge, tile
from ardiff.data.manifest import VideoRecord, read_manifest, usable
from ardiff.metrics.prompts import PROMPT_MEASURES
from ardiff.metrics.scores import format_score
from ardiff.metrics.shapes import SHAPE_MEASURES
from ardiff.metrics.tracking import MOTION_CHECKS
from ray_jobs.evaluation.config import QuickConfig
from ray_jobs.evaluation.quick import BY_CONDITION
from ray_jobs.evaluation.quick_scores import describe
from ray_jobs.generation.config import GenerateConfig
from ray_jobs.reports.html import Curve, Report, Score, Sheet, Stage, Table, Video, write_report
from ray_jobs.runtime.stages import StageRecord, versions

CAVEATS = [
    "This run shows that the system works from files to scores. It cannot show the paper's claims, which need the "
    "paper's data and sizes: docs/ablation.md reports its variants at this scale.",
    "Which ar_step scores best changes with the seed: compare several before preferring one.",
]


PROMPTED = 4
"""Videos of each set with prompts that the report shows one by one."""
WORST = 4
"""Prompts or classes of each set in the table of those that are followed least."""
SHOWN_BY_CONDITION = (*PROMPT_MEASURES[:-1], "frame identity", "steady colour", "smooth motion")
"""The shares in that table."""


def write_quickstart_report(
    path: Path,
    config: object,
    records: list[StageRecord],
    generated: list[GenerateConfig],
    evaluated: QuickConfig,
) -> None:
    """Writes the report from the records of the stages and the generated videos."""
    by_name = {record.name: record for record in records}
    curves = [
        Curve(
            title=title,
            x_label="step",
            y_label="loss",
            series={"training": _series(by_name[name].results["history"]["loss"])},
            log_y=True,
        )
        for name, title in (("train-vae", "AR-VAE loss"), ("train-dit", "AR-DiT loss"))
    ]
    scores = by_name["evaluate"].results
    total = sum(record.seconds for record in records)
    peak = max(record.peak_mib for record in records)
    write_report(
        path,
        Report(
            title="AR-Diffusion quickstart",
            subtitle="From H.264 files to a trained model, generated videos and a score",
            summary=_summary(scores, total, peak),
            stages=[Stage(r.name, r.seconds, r.peak_mib, "done", r.note) for r in records],
            curves=curves,
            sheets=[_real_sheet(evaluated), *(_sheet(g) for g in generated)],
            videos=[
                _real_video(evaluated, generated[0].fps),
                *(_video(g) for g in generated),
                *(video for g in generated for video in _prompted_videos(g)),
            ],
            scores=[_score(score, scores["sets"][score["set"]]) for score in _distances(scores)],
            tables=[
                *_prompt_tables(scores["sets"]),
                *_shape_tables(scores["sets"]),
                *_condition_tables(pd.read_csv(f"{evaluated.output}/{BY_CONDITION}")),
            ],
            config_yaml=to_yaml(config),
            versions=versions(),
            caveats=[*CAVEATS, _extractor_caveat(scores)],
        ),
    )


def _summary(scores: dict[str, Any], total: float, peak: float) -> list[str]:
    sets = scores["sets"]
    models = {name: values["distance"] for name, values in sets.items() if name.startswith("ar-step-")}
    best = min(models, key=models.__getitem__)
    shuffled = sets.get("shuffled frames")  # missing if controls are off
    control = "" if shuffled is None else f", shuffled frames {shuffled['distance']:.1f}"
    lines = [
        f"All stages took {total / 60:.1f} minutes; the largest used {peak / 1024:.1f} GiB.",
        f"Held-out clips are reconstructed at {sets['reconstruction']['psnr']:.1f} dB.",
        f"Best distance to real clips: {models[best]:.1f} ({best}); real clips themselves reach "
        f"{sets['real']['distance']:.1f}{control}.",
    ]
    if "fvd" in sets["real"]:
        fvd = min(sets[name]["fvd"] for name in models)
        extractor = scores["extractors"]["fvd"]
        control = f", shuffled frames {shuffled['fvd']:.1f}" if shuffled is not None and "fvd" in shuffled else ""
        real = f"{sets['real']['fvd']:.1f}"
        lines.insert(0, f"Best FVD: {fvd:.1f}; real clips reach {real}{control}. Extractor: {extractor}.")
    return [*_prompt_lines(sets, list(models)), *_share_lines(sets, list(models)), *lines]


def _prompt_lines(sets: dict[str, dict[str, float]], models: list[str]) -> list[str]:
    """How well the videos of all models follow their prompts; none for models without prompts."""
    if not all("prompt followed" in sets[name] for name in models):
        return []

    def shares(names: list[str], metric: str) -> str:
        return _range(metric, [sets[name][metric] for name in names])

    held_out = [name for name in models if name.endswith("-held-out")]
    seen = [name for name in models if name not in held_out]
    lines = [
        f"Frames that show the asked shape in the asked colour: {shares(seen, 'prompt followed')}; by another video's "
        f"prompt {shares(seen, 'shuffled prompt')}. Videos that move in the asked direction: "
        f"{shares(seen, 'prompt direction')}; of the asked size: {shares(seen, 'prompt size')}; at the asked speed: "
        f"{shares(seen, 'prompt speed')}."
    ]
    if held_out:
        lines.append(
            "Prompts for a shape in a colour that no training video has: asked shape and colour in "
            f"{shares(held_out, 'prompt followed')} of the frames."
        )
    return lines


def _range(metric: str, values: list[float]) -> str:
    """The smallest and the largest of some shares, such as ``95 to 98 %``."""
    low, high = format_score(metric, min(values)), format_score(metric, max(values))
    return low if low == high else f"{low.removesuffix(' %')} to {high}"


def _share_lines(sets: dict[str, dict[str, float]], models: list[str]) -> list[str]:
    """How well the videos of all models keep their shape and move; none for data without known shapes.

    A share is given as a range over the models, so the best of them does not stand for all.
    """
    if not all("frame identity" in sets[name] for name in models):
        return []

    def shares(metric: str) -> str:
        return _range(metric, [sets[name][metric] for name in models])

    real = sets["real"]
    checks = ", ".join(f"{name} {shares(name)}" for name in MOTION_CHECKS)
    return [
        f"Frames that show the asked class: {shares('frame identity')}; neighbouring frames that show the same shape: "
        f"{shares('neighbours alike')}. Real clips: {format_score('frame identity', real['frame identity'])} and "
        f"{format_score('neighbours alike', real['neighbours alike'])}.",
        f"Videos that pass all motion checks: {shares('motion')} ({checks}). Real clips: "
        f"{format_score('motion', real['motion'])}.",
    ]


def _prompt_tables(sets: dict[str, dict[str, float]]) -> list[Table]:
    """How well the videos of every set follow their prompts; none for models without prompts."""
    caption = (
        "Percent, means over videos. Prompt followed: frames that show the asked shape in the asked colour. Shuffled "
        "prompt: the same with the prompt of another video, which is what videos that ignore their prompts reach. Real "
        "clips are measured by their captions."
    )
    return _share_tables(sets, "Prompts", caption, PROMPT_MEASURES)


def _shape_tables(sets: dict[str, dict[str, float]]) -> list[Table]:
    """How well the videos of every set keep their shape; none for data without known shapes."""
    caption = (
        "Percent, means over videos. Frame identity: frames that show the asked class. Neighbours alike: neighbouring "
        "frames that show the same shape. Motion: videos that pass all five checks beside it. Recognised: videos whose "
        "class wins a vote of their frames, which hides a shape that turns into another one and back."
    )
    return _share_tables(sets, "Shapes and motion", caption, SHAPE_MEASURES)


def _condition_tables(means: pd.DataFrame) -> list[Table]:
    """The prompts or classes that each model follows least; none for data without known shapes.

    ``means`` is the result of :func:`ray_jobs.evaluation.quick_scores.by_condition`.
    """
    measures = [name for name in SHOWN_BY_CONDITION if name in means]
    if not measures:
        return []
    models = means[means["set"].str.startswith("ar-step-")]
    rows = [
        [row["set"], row["condition"], str(row["videos"]), *(f"{100 * row[measure]:.0f}" for measure in measures)]
        for row in models.groupby("set").head(WORST).to_dict("records")
    ]
    caption = f"Percent, means over their videos: at most {WORST} of each set. All are in scores/{BY_CONDITION}."
    return [Table("Prompts or classes that are followed least", caption, ["set", "asked", "videos", *measures], rows)]


def _share_tables(
    sets: dict[str, dict[str, float]], title: str, caption: str, measures: tuple[str, ...]
) -> list[Table]:
    """The measures of every set in percent, the best by the first one first; none if no set has them."""
    measured = {name: values for name, values in sets.items() if measures[0] in values}
    rows = [
        [name, *(f"{100 * values[measure]:.0f}" for measure in measures)]
        for name, values in sorted(measured.items(), key=lambda item: -item[1][measures[0]])
    ]
    return [Table(title, caption, ["set", *measures], rows)] if rows else []


def _distances(scores: dict[str, Any]) -> list[dict[str, Any]]:
    """The scores that are distances between features; the others are shares or describe the reconstruction."""
    return [score for score in scores["scores"] if score["metric"] in scores["extractors"]]


def _extractor_caveat(scores: dict[str, Any]) -> str:
    random = (
        f"The distance uses a seeded random network ({scores['extractors']['distance']}), not I3D: compare it with the "
        "controls of this table, never with published FVD values."
    )
    if "fvd" not in scores["extractors"]:
        return f"{random} `ardiff weights fetch i3d` adds FVD to the next run."
    return f"{random} FVD uses the real I3D ({scores['extractors']['fvd']}); so few clips bias it upwards."


def _series(points: list[list[float]]) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _frames(config: GenerateConfig, count: int) -> np.ndarray:
    records = read_manifest(config.manifest)[:count]
    return np.stack([read_clip(r, 0, config.num_frames, 1, None) for r in records])


def _describe(config: GenerateConfig) -> str:
    ar_step = config.resolved_ar_step
    kind = {0: "synchronous", config.num_inference_steps: "auto-regressive"}.get(ar_step, "asynchronous")
    held_out = ", held-out prompts" if (config.prompts or "").endswith("held-out.txt") else ""
    return f"{config.num_frames} frames, ar_step {ar_step} ({kind}){held_out}"


def _sheet(config: GenerateConfig) -> Sheet:
    records = read_manifest(config.manifest)[:8]
    png = contact_sheet(_frames(config, len(records)), [_label(r) for r in records])
    return Sheet(f"Generated: {_describe(config)}", "Each row is a video; time runs to the right.", png)


def _prompted_videos(config: GenerateConfig) -> list[Video]:
    """The first videos of a set with prompts, each below its prompt; none for a set without prompts."""
    records = [record for record in read_manifest(config.manifest)[:PROMPTED] if record.captions]
    frames = _frames(config, len(records)) if records else np.empty(0)
    return [
        Video(record.captions[0], _describe(config), encode_video(enlarge(video, 6), config.fps, crf=16), "video/mp4")
        for record, video in zip(records, frames, strict=True)
    ]


def _real_clips(config: QuickConfig, count: int) -> tuple[np.ndarray, list[str]]:
    """The first clips of held-out videos, uint8 ``(B, F, H, W, 3)``, and what they show in words."""
    records = usable(read_manifest(config.real), "test", config.num_frames, config.fps)[:count]
    clips = [read_clip(r, 0, config.num_frames, 1, config.resolution, config.fps) for r in records]
    return np.stack(clips), [_label(r) for r in records]


def _label(record: VideoRecord) -> str:
    """The first caption of a video, or its class."""
    return record.captions[0] if record.captions else record.class_name


def _real_sheet(config: QuickConfig) -> Sheet:
    png = contact_sheet(*_real_clips(config, 8))
    return Sheet("Real, held out", "Clips that the model has not seen, for comparison.", png)


def _real_video(config: QuickConfig, fps: float) -> Video:
    return _playing("Real, held out", _real_clips(config, 16)[0], fps)


def _video(config: GenerateConfig) -> Video:
    return _playing(f"Generated: {_describe(config)}", _frames(config, 16), config.fps)


def _playing(title: str, videos: np.ndarray, fps: float) -> Video:
    tiled = tile(videos, columns=4, scale=2)
    return Video(title, "", encode_video(tiled, fps, crf=16), "video/mp4")


def _score(score: dict[str, Any], values: dict[str, float]) -> Score:
    """The table row of a score, with its interval. The row of a set's distance also lists its other values."""
    notes = [] if score["low"] is None else [f"95 % interval {score['low']:.1f} to {score['high']:.1f}"]
    if score["metric"] == "distance" and (words := describe(values)):
        notes.append(words)
    unit, name = {"fvd": "FVD"}.get(score["metric"], score["metric"]), score["set"]
    return Score(name, score["score"], unit, ", ".join(notes), highlight=name.startswith("ar-step-"))
