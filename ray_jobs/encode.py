"""Encodes clips of the training videos to latents, and their captions: a Ray Data job that writes Parquet files.

The set lies in a folder named by a fingerprint of the AR-VAE's weights and the preprocessing, so latents of another
model are never mixed with these. Only clips that the set lacks are encoded: new videos, more offsets or mirrored copies
extend it. Every file is written atomically, so a kill loses only the files in flight. Token states of the captions lie
in a folder of their own below it, so changed captions change no latents.

    ardiff encode --config configs/quickstart/encode.yaml
"""

import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from rich.markup import escape

from ardiff import onednn
from ardiff.cli import main
from ardiff.config import fingerprint, to_yaml
from ardiff.data import storage
from ardiff.data.buckets import shapes_of
from ardiff.data.clip_index import CurrentVideos, clip_numbers, reading_bounds, split_numbers, stored_clips
from ardiff.data.clips import read_good_clips
from ardiff.data.error_log import ERRORS, crashed_sample, too_short
from ardiff.data.latents import (
    DESCRIPTION,
    LatentSet,
    LatentStatistics,
    latent_files,
    latent_sums,
    read_description,
    read_keys,
    read_labelled_keys,
    read_latents,
    select_rows,
    statistics_of,
    vae_fingerprint,
    write_description,
    write_shard,
)
from ardiff.data.manifest import VideoRecord, class_names, manifest_table, read_manifest, record_at, usable
from ardiff.data.transforms import to_unit
from ardiff.errors import ConfigError, DataError, StorageError
from ardiff.pretrained import load_autoencoder
from ardiff.resolution import Resolution
from ardiff.text.config import TextConfig
from ardiff.vae import AutoencoderConfig
from ray_jobs.encoding.texts import encode_texts, read_tokenizer
from ray_jobs.runtime.cluster import await_resource, ray_cluster, resolve_device
from ray_jobs.runtime.console import print_line
from ray_jobs.runtime.crash_guard import MAX_CRASHES, TASK_RETRIES, crash_guard
from ray_jobs.runtime.error_log import Reporter, error_log
from ray_jobs.runtime.progress import remote_progress, report_errors
from ray_jobs.runtime.stages import stage


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeConfig:
    """The clips to encode, and the model."""

    manifest: str = "runs/data/manifest.parquet"
    """Written by ``ardiff prepare``."""
    vae: str = "runs/vae/model"
    """Folder of the trained AR-VAE."""
    output: str = "runs/latents"
    """The set is written to a folder below this one, named by its fingerprint."""
    num_frames: int = 16
    """Frames per clip."""
    stride: int = 1
    """Distance between two frames of a clip, in frames of the video."""
    fps: float = 0.0
    """Frame rate at which videos are sampled; ``stride`` then counts frames at this rate. 0 takes every frame of the
    file."""
    clip_step: int = 8
    """Distance between the starts of two clips of a video."""
    offsets: tuple[int, ...] = (0,)
    """Start frames of the first clip of a video. Each offset adds clips ``clip_step`` apart."""
    mirrored: bool = False
    """Also encode the mirror image of every clip."""
    batch_size: int = 16
    """Clips per batch of an actor."""
    clips_per_file: int = 128
    """Clips per Parquet file. An interruption loses at most this many clips per actor."""
    min_actors: int = 1
    """Encoding actors at the start. More are added up to ``max_actors`` while there is work and the cluster has
    resources."""
    max_actors: int = 1
    """Most encoding actors. On a GPU cluster, each takes one GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` uses GPUs if the cluster has any."""
    max_bad_fraction: float = 0.05
    """Share of the clips that may be bad. Each becomes a row of ``errors.parquet``."""
    text: TextConfig = field(default_factory=TextConfig)
    """The text encoder, if captions are to be encoded too."""

    def __post_init__(self) -> None:
        names = ("num_frames", "stride", "clip_step", "batch_size", "clips_per_file", "min_actors")
        if min(getattr(self, name) for name in names) < 1 or self.max_actors < self.min_actors:
            raise ValueError(f"{', '.join(names)} must be at least 1, and max_actors at least min_actors")
        if self.fps < 0 or not 0 <= self.max_bad_fraction <= 1:
            raise ValueError("fps must not be negative, and max_bad_fraction between 0 and 1")
        if not self.offsets or min(self.offsets) < 0:
            raise ValueError("offsets must be one or more frame numbers, none below 0")

    @property
    def span(self) -> int:
        """Video frames from the first to the last frame of a clip."""
        return (self.num_frames - 1) * self.stride + 1

    def starts(self, length: int) -> list[int]:
        """First frames of the clips of a video of ``length`` frames, ascending."""
        return sorted({s for o in self.offsets for s in range(o, length - self.span + 1, self.clip_step)})


def run(config: EncodeConfig, key: str = "") -> str:
    """Encodes the clips that the set lacks. Returns the folder of the set. Raises ArdiffError."""
    manifest = read_manifest(config.manifest)
    records, names = usable(manifest, "train", config.span, config.fps), class_names(manifest)
    model = load_autoencoder(config.vae).config
    weights = vae_fingerprint(config.vae)
    name = fingerprint(weights, config.num_frames, config.stride, config.fps)
    folder = storage.absolute(storage.join(config.output, name))
    shape = (config.num_frames, model.num_tokens, model.token_dim)
    tokenizer = read_tokenizer(config.text, records)
    with ray_cluster(config.max_actors + 3), stage("encode", config.output, key) as record:
        wanted = np.concatenate(
            [clip_numbers(i, config.starts(r.length_at(config.fps)), config.mirrored) for i, r in enumerate(records)]
        )
        stored_classes = _stored_classes(folder)
        stored = _remove_outdated(folder, records, CurrentVideos.of(manifest, stored_classes))
        missing = np.setdiff1d(wanted, stored)
        short = too_short(manifest, "train", config.span, config.fps)
        with error_log(config.output, len(wanted), config.max_bad_fraction, "clip", excluded=short) as report:
            if len(missing):
                table = manifest_table(records)
                bucket_of = shapes_of(table, model.shapes)[split_numbers(missing)[0]]
                for index in np.unique(bucket_of).tolist():
                    _encode(config, model, index, folder, missing[bucket_of == index], table, report)
        if len(missing) or names != stored_classes or not storage.exists(storage.join(folder, DESCRIPTION)):
            storage.write_bytes(storage.join(folder, "config.yaml"), to_yaml(config).encode())
            files, rows, statistics = _statistics(folder, shape)
            if model.unit_latents:
                statistics = LatentStatistics.neutral(model.num_tokens, model.token_dim)
            content = fingerprint(files, rows, names)
            vae = storage.absolute(config.vae)
            shapes = model.described_shapes
            description = LatentSet(name, *shape, names, files, rows, statistics, vae, weights, content, shapes)
            write_description(folder, description)
        description = read_description(folder)
        if others := len(np.setdiff1d(stored, wanted)):
            print_line(f"{others} other clips of the set have other offsets, are mirrored, or their videos are gone")
        count = sum(description.rows)
        record.note = f"{len(missing)} clips encoded, {len(wanted) - len(missing)} were there; "
        record.note += f"{count} clips, latent std {description.statistics.std:.3f}"
        if tokenizer is not None:
            device = resolve_device(config.device)
            _check_resources(config, device)
            text_note = encode_texts(config.text, tokenizer, folder, manifest, records, _actors(config), device.type)
            record.note += f"; {text_note}"
        record.results = {"folder": folder}
    print_line(f"Latents: [bold]{escape(folder)}[/]", folder=folder)
    return folder


def _stored_classes(folder: str) -> list[str]:
    """The class names of the set; none if it is not complete or its description is damaged."""
    try:
        return read_description(folder).class_names
    except StorageError:
        raise
    except DataError:
        return []


def _remove_outdated(folder: str, records: list[VideoRecord], current: CurrentVideos) -> np.ndarray:
    """Removes clips that no longer agree with the manifest. Returns the numbers of the others, ascending."""
    files = latent_files(folder)
    if not files:
        return np.array([], dtype=np.int64)

    def read(row: dict[str, Any]) -> dict[str, Any]:
        return {"file": row["file"], **read_labelled_keys(row["file"]).to_pydict()}

    rows = ray.data.from_items([{"file": file} for file in files]).map(read).iter_rows()
    numbers, stays = stored_clips(rows, records, current)
    if outdated := sum(int((~stay).sum()) for stay in stays.values()):
        print_line(f"{outdated} clips of the set are removed: the content, label or split of their videos has changed")
    for file, stay in stays.items():
        if stay.all():
            continue
        # The description counts rows, so the set is not complete from here on.
        storage.delete_file(storage.join(folder, DESCRIPTION))
        if stay.any():
            storage.write_bytes(file, select_rows(file, stay))
        else:
            storage.delete_file(file)
    return numbers


def _encode(
    config: EncodeConfig,
    model: AutoencoderConfig,
    shape_index: int,
    folder: str,
    missing: np.ndarray,
    table: pa.Table,
    report: Reporter,
) -> None:
    """Encodes the clips with the numbers ``missing``, all of one shape, on Ray: tasks decode, actors encode, tasks
    write. ``table`` holds the videos."""
    device = resolve_device(config.device)
    _check_resources(config, device)
    bounds = reading_bounds(missing)
    readings = len(bounds) - 1
    shared = ray.put((missing, bounds, table))
    with remote_progress("encoding", len(missing), "clip") as progress:

        def decode(row: dict[str, Any]) -> list[dict[str, Any]]:
            missing, bounds, table = ray.get(shared)
            videos, starts, mirrored = split_numbers(missing[bounds[row["id"]] : bounds[row["id"] + 1]])
            record = record_at(table, int(videos[0]))
            with report_errors(progress), crash_guard(progress, f"reading {row['id']}") as crashes:
                if crashes >= MAX_CRASHES:
                    for start in np.unique(starts).tolist():
                        report(crashed_sample(record.uri, start, crashes))
                    return []
                return _decode(config, model.shapes[shape_index], record, starts.tolist(), mirrored.tolist(), report)

        def write(batch: Any) -> Any:
            count = len(batch["start"])
            shapes = {"shape": np.full(count, shape_index)} if model.buckets else {}
            with report_errors(progress):
                name = write_shard(folder, {**batch, **shapes})
            progress.add.remote(count)
            return {"file": [name]}

        files = (
            ray.data.range(readings, override_num_blocks=min(max(readings // 4, 16), 1024, readings))
            .flat_map(decode, max_retries=TASK_RETRIES)
            .map_batches(
                _Encoder,
                fn_constructor_args=(config.vae, device.type),
                batch_size=config.batch_size,
                compute=_actors(config),
                num_gpus=1 if device.type == "cuda" else 0,
                num_cpus=1,
                max_task_retries=TASK_RETRIES,
            )
            .map_batches(write, batch_size=config.clips_per_file)
        )
        for _ in files.iter_rows():
            pass


def _actors(config: EncodeConfig) -> ray.data.ActorPoolStrategy:
    return ray.data.ActorPoolStrategy(min_size=config.min_actors, max_size=config.max_actors)


def _check_resources(config: EncodeConfig, device: torch.device) -> None:
    """Raises ConfigError if the cluster lacks resources for the actors and for one task that decodes."""
    kind: Literal["CPU", "GPU"] = "GPU" if device.type == "cuda" else "CPU"
    have = await_resource(kind, config.min_actors + (kind == "CPU"))
    if config.min_actors > have - (kind == "CPU"):
        raise ConfigError(
            f"min_actors={config.min_actors} needs as many {kind}s{' and one to decode with' * (kind == 'CPU')}, but "
            f"the Ray cluster has {have}: lower it."
        )


def _decode(
    config: EncodeConfig,
    resolution: Resolution,
    record: VideoRecord,
    starts: list[int],
    mirrored: list[int],
    report: Reporter,
) -> list[dict[str, Any]]:
    """The clips of one reading, one row per clip. Clips that cannot be decoded are reported."""
    clips = read_good_clips(record, starts, config.num_frames, config.stride, config.fps, resolution, report)
    return [
        {
            "uri": record.uri,
            "etag": record.version,
            "label": record.label,
            "start": start,
            "mirrored": bool(mirror),
            "video": clips[start][:, :, ::-1] if mirror else clips[start],
        }
        for start, mirror in zip(starts, mirrored, strict=True)
        if start in clips
    ]


class _Encoder:
    """An actor that encodes batches of clips to the mean of the AR-VAE's posterior."""

    def __init__(self, vae: str, device: str) -> None:
        self.model = load_autoencoder(vae).to(device)
        if onednn.packable(self.model):
            onednn.pack_linear(self.model)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        video = to_unit(torch.from_numpy(np.ascontiguousarray(batch.pop("video"))).to(self.model.device))
        return {**batch, "latents": self.model.latents(video).float().cpu().numpy()}  # (n, F, L, D)


def _statistics(folder: str, shape: tuple[int, int, int]) -> tuple[list[str], list[int], LatentStatistics]:
    """The files of a set, the number of clips in each, and the statistics of all latents.

    Files are sorted by their first clip, not by name: names depend on the URIs of the videos, and training on the same
    clips should not.
    """

    def read(row: dict[str, Any]) -> dict[str, Any]:
        uri = storage.join(folder, row["file"])
        first, latents = read_keys(uri)[0], read_latents(uri, shape)[0]
        order = {"uri": first.uri, "start": first.start, "mirrored": first.mirrored}
        return {**row, **order, "rows": len(latents), "sums": latent_sums(latents)}

    uris = latent_files(folder)
    if not uris:
        raise DataError(f"No clip could be encoded: see {ERRORS} beside {folder}.")
    names = [uri[len(folder.rstrip("/")) + 1 :] for uri in uris]
    files = ray.data.from_items([{"file": name} for name in names]).map(read).take_all()
    files.sort(key=lambda file: (file["uri"], file["start"], file["mirrored"]))
    return (
        [str(file["file"]) for file in files],
        [int(file["rows"]) for file in files],
        statistics_of([file["sums"] for file in files]),
    )


if __name__ == "__main__":
    raise SystemExit(main(["encode", *sys.argv[1:]]))
