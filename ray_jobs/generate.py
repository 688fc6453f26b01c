"""Generates videos with a trained pipeline in parallel: video files, a manifest and a contact sheet.

A video depends only on its class, its seed and the settings, so an interrupted run resumes with the missing videos.

    python -m ray_jobs.generate pipeline=runs/quickstart/dit/pipeline num_frames=128 ar_step=5
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np

from ardiff.cli import main
from ardiff.config import fingerprint
from ardiff.data import storage
from ardiff.data.decode import decode_clip
from ardiff.data.encode import contact_sheet
from ardiff.data.manifest import write_manifest
from ardiff.errors import ArdiffError, ConfigError
from ardiff.sampling.params import SamplingParams, validate
from ardiff.sweep.manifest import video_record
from ardiff.sweep.models import SweptModel
from ardiff.sweep.specs import Record, VideoSpec, find_complete, make_spec
from ray_jobs.generation.actors import generate_videos
from ray_jobs.generation.config import GenerateConfig, VideoSets
from ray_jobs.generation.prompts import read_prompts
from ray_jobs.runtime.cluster import ray_cluster
from ray_jobs.runtime.stages import claim_output, record_run, stage

SHEET_VIDEOS = 8
"""Videos on the contact sheet."""


def run(config: GenerateConfig, key: str = "") -> None:
    """Generates the missing videos. Raises ArdiffError before any work if the pipeline cannot sample them."""
    run_sets(VideoSets(output=config.output, sets=(config,)), key, f"generate {config.num_frames} frames")


def run_sets(job: VideoSets, key: str = "", name: str = "generate") -> None:
    """Generates the missing videos of each set, all with one pipeline. Raises ArdiffError as :func:`run` does."""
    model = SweptModel.load(job.sets[0].pipeline)
    prompts_by_set = [read_prompts(config.prompts) if config.prompts else [] for config in job.sets]
    params_by_set = [_video_params(*pair, model) for pair in zip(job.sets, prompts_by_set, strict=True)]
    with ray_cluster(), stage(name, job.output, key) as record:
        specs_by_set: list[list[VideoSpec]] = []
        complete: dict[str, Record] = {}
        for config, prompts, params in zip(job.sets, prompts_by_set, params_by_set, strict=True):
            _claim_output(config, prompts, params[0], model)
            record_run(config.output, config)
            specs = [make_spec(model, p, config.precision, config.files, f"{i:05d}") for i, p in enumerate(params)]
            records = find_complete(specs, storage.absolute(config.output))
            complete |= {spec.record: records[spec.id] for spec in specs if spec.id in records}
            specs_by_set.append(specs)
        specs = [spec for set_specs in specs_by_set for spec in set_specs]
        records = generate_videos(specs, complete, job.sets[0].workers, "generating")
        if failed := [spec for spec in specs if records[spec.record].status == "failed"]:
            first = records[failed[0].record]
            raise ArdiffError(
                f"{len(failed)} of {len(specs)} videos could not be generated; the first, of seed "
                f"{failed[0].sampling.seed}, because of {first.error}: {first.message} The same command tries them "
                "again."
            )
        for config, set_specs in zip(job.sets, specs_by_set, strict=True):
            _write_manifest(config, model, set_specs, records)
        record.note = f"{len(specs) - len(complete)} videos generated, {len(complete)} were complete"


def _video_params(config: GenerateConfig, prompts: Sequence[str], model: SweptModel) -> list[SamplingParams]:
    """The parameters of each video. Prompts of a file take turns, as do the classes without any prompt.

    Raises ConfigError if the model cannot sample one of them.
    """
    turns: Sequence[str | None] = prompts or [config.prompt]
    classes = 0 if any(turns) else model.info.num_classes
    videos = []
    try:
        params = [validate(replace(config.params, prompt=prompt), model.info) for prompt in turns]
    except ValueError as error:
        raise ConfigError(f"{config.pipeline} cannot sample these videos: {error}.") from error
    for index in range(config.num_videos):
        video = params[index % len(params)]
        label = index % classes if video.class_label is None and classes else video.class_label
        videos.append(replace(video, class_label=label, seed=video.seed + index))
    return videos


def _write_manifest(
    config: GenerateConfig, model: SweptModel, specs: list[VideoSpec], records: dict[str, Record]
) -> None:
    """Writes the manifest and the contact sheet of a complete set."""
    shape = model.info.shape_of(specs[0].sampling)
    write_manifest(config.manifest, [video_record(spec, records[spec.record], shape) for spec in specs])
    shown = specs[:SHEET_VIDEOS]
    videos = np.stack([decode_clip(storage.read_bytes(spec.uri), 0, config.num_frames) for spec in shown])
    names = [spec.subject or f"seed {spec.sampling.seed}" for spec in shown]
    storage.write_bytes(storage.join(config.output, "sheet.png"), contact_sheet(videos, names))


def _claim_output(config: GenerateConfig, prompts: Sequence[str], first: SamplingParams, model: SweptModel) -> None:
    """Writes a fingerprint of the settings to the folder. Raises ConfigError if it holds videos of other settings.

    ``first`` is the parameters of the first video, whose class and prompt may be one of several.
    """
    shared = replace(first, class_label=config.class_label, prompt=config.prompt)
    settings = (shared.changed(), config.precision, asdict(replace(config.files, output="")))
    claim_output(config.output, fingerprint(model.weights, *settings, *prompts))


if __name__ == "__main__":
    raise SystemExit(main(["generate", *sys.argv[1:]]))
