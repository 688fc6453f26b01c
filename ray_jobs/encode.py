"""Encodes clips of the training videos to latents: a Ray Data job that writes Parquet.

The set lies in a folder named by a fingerprint of the AR-VAE's weights and the preprocessing, so latents of another
model are never mistaken for these. Only clips that are not in it yet are encoded: new videos, more offsets or mirrored
copies extend it. A file of clips is written whole or not at all, so a kill loses the files in flight and no more.

    ardiff encode --config configs/quickstart/encode.yaml
"""

import sys
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import ray
import ray.data
import torch
from rich.markup import escape

from ardiff import onednn
from ardiff.cli import main
from ardiff.config import fingerprint, to_yaml
from ardiff.data import storage
from ardiff.data.clips import read_clips
from ardiff.data.decode import crop_square
from ardiff.data.error_log import ERRORS, bad_sample, crashed_sample, too_short
from ardiff.data.latents import (
    DESCRIPTION,
    LatentSet,
    LatentStatistics,
    latent_sums,
    read_description,
    read_keys,
    read_labelled_keys,
    read_latents,
    statistics_of,
    vae_fingerprint,
    with_rows,
    write_description,
    write_shard,
)
from ardiff.data.manifest import VideoRecord, class_names, manifest_table, read_manifest, record_at, usable
from ardiff.data.transforms import to_unit
from ardiff.errors import ConfigError, DataError, DecodeError, StorageError
from ardiff.pretrained import load_autoencoder
from ardiff.vae import AutoencoderConfig
from ray_jobs.runtime.cluster import await_resource, ray_cluster, resolve_device
from ray_jobs.runtime.console import print_line
from ray_jobs.runtime.crash_guard import MAX_CRASHES, TASK_RETRIES, crash_guard
from ray_jobs.runtime.error_log import Reporter, error_log
from ray_jobs.runtime.progress import remote_progress, report_errors
from ray_jobs.runtime.stages import stage


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeConfig:
    """What to encode, with which model."""

    manifest: str = "runs/data/manifest.parquet"
    """Written by ``ardiff prepare``."""
    vae: str = "runs/vae/model"
    """Folder of the trained AR-VAE."""
    output: str = "runs/latents"
    """The set is written to a folder below this one, named by its fingerprint."""
    num_frames: int = 16
    """Frames of a clip."""
    stride: int = 1
    """Distance between two frames of a clip in the video."""
    fps: float = 0.0
    """Frame rate at which videos are seen, whatever their own is. 0 takes frames as they come."""
    clip_step: int = 8
    """Distance between the starts of two clips of a video."""
    offsets: tuple[int, ...] = (0,)
    """Frames at which the first clip of a video starts; each adds clips ``clip_step`` apart."""
    mirrored: bool = False
    """Also encode the mirror image of every clip."""
    batch_size: int = 16
    """Clips encoded at once by an actor."""
    clips_per_file: int = 128
    """Clips of a Parquet file, which is what an interruption loses at most of each actor's work."""
    min_actors: int = 1
    """Encoding actors to begin with; more are started up to ``max_actors`` as long as there is work and room."""
    max_actors: int = 1
    """Encoding actors at most; on a GPU cluster each takes one GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes GPUs where there are some."""
    max_bad_fraction: float = 0.05
    """Share of the clips that may be bad; each becomes a row of ``errors.parquet``."""

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
        """Video frames that a clip reaches over."""
        return (self.num_frames - 1) * self.stride + 1

    def starts(self, length: int) -> list[int]:
        """First frames of the clips of a video of ``length`` frames, ascending."""
        return sorted({s for o in self.offsets for s in range(o, length - self.span + 1, self.clip_step)})


CLIPS_PER_READ = 8
"""Clips that one reading of a video gives at most: what a task holds in memory."""


def run(config: EncodeConfig, key: str = "") -> str:
    """Encodes what is not encoded yet. Returns the set's folder. Raises ArdiffError."""
    manifest = read_manifest(config.manifest)
    records, names = usable(manifest, "train", config.span, config.fps), class_names(manifest)
    model = load_autoencoder(config.vae).config
    weights = vae_fingerprint(config.vae)
    name = fingerprint(weights, config.num_frames, config.stride, config.fps)
    folder = storage.absolute(storage.join(config.output, name))
    shape = (config.num_frames, model.num_tokens, model.token_dim)
    with ray_cluster(config.max_actors + 3), stage("encode", config.output, key) as record:
        wanted = np.concatenate([_numbers(config, index, r) for index, r in enumerate(records)])
        before = _classes_of(folder)
        present = _present(folder, records, Current.of(manifest, before))
        missing = np.setdiff1d(wanted, present)
        short = too_short(manifest, "train", config.span, config.fps)
        with error_log(config.output, len(wanted), config.max_bad_fraction, "clip", excluded=short) as bad:
            if len(missing):
                _encode(config, model, folder, missing, records, bad)
        if len(missing) or names != before or not storage.exists(storage.join(folder, DESCRIPTION)):
            storage.write_bytes(storage.join(folder, "config.yaml"), to_yaml(config).encode())
            files, rows, statistics = _statistics(folder, shape)
            if model.unit_latents:
                statistics = LatentStatistics.neutral(model.num_tokens, model.token_dim)
            content = fingerprint(files, rows, names)
            write_description(
                folder,
                LatentSet(name, *shape, names, files, rows, statistics, storage.absolute(config.vae), weights, content),
            )
        description = read_description(folder)
        if others := len(np.setdiff1d(present, wanted)):
            print_line(
                f"{others} clips of the set are of other offsets, mirrored, or of videos that the manifest lacks now"
            )
        count = sum(description.rows)
        record.note = f"{len(missing)} clips encoded, {len(wanted) - len(missing)} were there; "
        record.note += f"{count} clips, latent std {description.statistics.std:.3f}"
        record.results = {"folder": folder}
    print_line(f"Latents: [bold]{escape(folder)}[/]", folder=folder)
    return folder


START_BITS = 31
"""Bits of a clip's number for its start; the 31 above it are the video's place among the records, the last one says
whether it is mirrored. One integer a clip is all that the driver keeps of it."""


def _numbers(config: EncodeConfig, video: int, record: VideoRecord) -> np.ndarray:
    """The numbers of a video's clips, int64, ascending."""
    starts = np.array(config.starts(record.length_at(config.fps)), dtype=np.int64)
    plain = (np.int64(video) << (START_BITS + 1)) + (starts << 1)
    return np.stack([plain, plain + 1], axis=1).reshape(-1) if config.mirrored else plain


def _classes_of(folder: str) -> list[str]:
    """The names of the set's classes; none if it is not complete or its description is damaged."""
    try:
        return read_description(folder).class_names
    except StorageError:
        raise
    except DataError:
        return []


@dataclass(frozen=True, slots=True)
class Current:
    """What the manifest says now, which clips that were encoded earlier must agree with."""

    videos: dict[str, tuple[str, int] | None]
    """Etag and label of every video; None for one that training must not see."""
    labels: list[bool]
    """Of the classes that the set had: whether each is called the same by the manifest."""

    @classmethod
    def of(cls, manifest: list[VideoRecord], before: list[str]) -> "Current":
        """``before`` are the names of the set's classes; none if it is not complete."""
        train = {r.uri: (r.etag, r.label) if r.split == "train" and r.status != "skipped" else None for r in manifest}
        names = class_names(manifest)
        return cls(train, [before[label : label + 1] == names[label : label + 1] for label in range(len(before))])

    def holds(self, uri: str, etag: str, label: int) -> bool:
        """Whether a clip of this video, content and label may stay; of videos that the manifest lacks, by its class."""
        if uri in self.videos:
            return self.videos[uri] == (etag, label)
        return label < len(self.labels) and self.labels[label]


def _present(folder: str, records: list[VideoRecord], current: Current) -> np.ndarray:
    """The numbers of the clips that the set has, ascending. Those that are not as the manifest says any more, and those
    that it has twice, are taken out of it first. Videos that the manifest lacks get numbers behind all others.
    """
    files = storage.list_files(folder, (".parquet",)) if storage.exists(folder) else []
    places = {record.uri: place for place, record in enumerate(records)}

    def look(row: dict[str, Any]) -> dict[str, Any]:
        return {"file": row["file"], **read_labelled_keys(row["file"]).to_pydict()}

    found: list[tuple[str, np.ndarray]] = []
    for row in ray.data.from_items([{"file": file} for file in files]).map(look).iter_rows() if files else ():
        videos = np.array([places.setdefault(str(uri), len(places)) for uri in row["uri"]], dtype=np.int64)
        clips = zip(row["uri"], row["etag"], row["label"], strict=True)
        fresh = np.array([current.holds(str(uri), str(etag), int(label)) for uri, etag, label in clips], dtype=bool)
        numbers = (videos << (START_BITS + 1)) + (np.array(row["start"], dtype=np.int64) << 1) + row["mirrored"]
        found.append((str(row["file"]), np.where(fresh, numbers, -1)))
    if not found:
        return np.array([], dtype=np.int64)
    numbers, first = np.unique(np.concatenate([part for _, part in found]), return_index=True)
    kept = np.zeros(sum(len(part) for _, part in found), dtype=bool)
    kept[first[numbers >= 0]] = True
    if stale := len(kept) - int(kept.sum()):
        print_line(f"{stale} clips of the set are taken out: their videos have another content, label or split now")
    for (file, part), begin in zip(found, np.cumsum([0, *[len(part) for _, part in found[:-1]]]), strict=True):
        keep = kept[begin : begin + len(part)]
        if keep.all():
            continue
        # The description counts rows, so the set is not complete from here on.
        storage.delete_file(storage.join(folder, DESCRIPTION))
        if keep.any():
            storage.write_bytes(file, with_rows(file, keep))
        else:
            storage.delete_file(file)
    return numbers[numbers >= 0]


def _encode(
    config: EncodeConfig,
    model: AutoencoderConfig,
    folder: str,
    missing: np.ndarray,
    records: list[VideoRecord],
    report: Reporter,
) -> None:
    device = resolve_device(config.device)
    _check_room(config, device)
    bounds = _readings(missing)
    readings = len(bounds) - 1
    shared = ray.put((missing, bounds, manifest_table(records)))
    with remote_progress("encoding", len(missing), "clip") as progress:

        def decode(row: dict[str, Any]) -> list[dict[str, Any]]:
            missing, bounds, videos = ray.get(shared)
            numbers = missing[bounds[row["id"]] : bounds[row["id"] + 1]]
            record = record_at(videos, int(numbers[0] >> (START_BITS + 1)))
            starts, mirrored = (numbers >> 1) & ((1 << START_BITS) - 1), numbers & 1
            with report_errors(progress), crash_guard(progress, f"reading {row['id']}") as crashes:
                if crashes >= MAX_CRASHES:
                    for start in sorted(set(starts.tolist())):
                        report(crashed_sample(record.uri, start, crashes))
                    return []
                return _decode(config, model.resolution, record, starts.tolist(), mirrored.tolist(), report)

        def write(batch: Any) -> Any:
            with report_errors(progress):
                name = write_shard(folder, batch)
            progress.add.remote(len(batch["start"]))
            return {"file": [name]}

        files = (
            ray.data.range(readings, override_num_blocks=min(max(readings // 4, 16), 1024, readings))
            .flat_map(decode, max_retries=TASK_RETRIES)
            .map_batches(
                _Encoder,
                fn_constructor_args=(config.vae, device.type),
                batch_size=config.batch_size,
                compute=ray.data.ActorPoolStrategy(min_size=config.min_actors, max_size=config.max_actors),
                num_gpus=1 if device.type == "cuda" else 0,
                num_cpus=1,
                max_task_retries=TASK_RETRIES,
            )
            .map_batches(write, batch_size=config.clips_per_file)
        )
        for _ in files.iter_rows():
            pass


def _check_room(config: EncodeConfig, device: torch.device) -> None:
    """Raises ConfigError if the actors would leave nothing to decode with, or wait for what is not there for ever."""
    kind: Literal["CPU", "GPU"] = "GPU" if device.type == "cuda" else "CPU"
    have = await_resource(kind, config.min_actors + (kind == "CPU"))
    if config.min_actors > have - (kind == "CPU"):
        raise ConfigError(
            f"min_actors={config.min_actors} needs as many {kind}s{' and one to decode with' * (kind == 'CPU')}, but "
            f"the Ray cluster has {have}: lower it."
        )


def _readings(missing: np.ndarray) -> np.ndarray:
    """Where the portions begin that one reading of a video gives, and where the last one ends."""
    _, first, inverse = np.unique(missing >> (START_BITS + 1), return_index=True, return_inverse=True)
    place = np.arange(len(missing)) - first[inverse]
    return np.append(np.flatnonzero(place % CLIPS_PER_READ == 0), len(missing))


def _decode(
    config: EncodeConfig,
    resolution: int,
    record: VideoRecord,
    starts: list[int],
    mirrored: list[int],
    report: Reporter,
) -> list[dict[str, Any]]:
    """The clips of one reading, each as a row; those that cannot be decoded are told to ``report``."""
    clips: dict[int, np.ndarray] = {}
    portions = [sorted(set(starts))]
    while portions:
        portion = portions.pop()
        frames = [[start + config.stride * i for i in range(config.num_frames)] for start in portion]
        try:
            found = read_clips(record, frames, config.fps, resolution)
        except (DecodeError, StorageError) as error:
            if len(portion) > 1:  # find out which of them it is
                portions += [[start] for start in portion]
            else:
                report(bad_sample(record.uri, portion[0], error))
            continue
        clips |= {start: crop_square(clip, resolution) for start, clip in zip(portion, found, strict=True)}
    known = {"uri": record.uri, "etag": record.etag, "label": record.label}
    return [
        {
            **known,
            "start": start,
            "mirrored": bool(mirror),
            "video": clips[start][:, :, ::-1] if mirror else clips[start],
        }
        for start, mirror in zip(starts, mirrored, strict=True)
        if start in clips
    ]


class _Encoder:
    """An actor that holds the AR-VAE and encodes batches of clips to the posterior's mean."""

    def __init__(self, vae: str, device: str) -> None:
        self.model = load_autoencoder(vae).to(device)
        if onednn.packable(self.model):
            onednn.pack_linear(self.model)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        video = to_unit(torch.from_numpy(np.ascontiguousarray(batch.pop("video"))).to(self.model.device))
        return {**batch, "latents": self.model.latents(video).float().cpu().numpy()}  # (n, F, L, D)


def _statistics(folder: str, shape: tuple[int, int, int]) -> tuple[list[str], list[int], LatentStatistics]:
    """The files of a set, their rows, and over all latents the mean per token and channel and one deviation.

    Files come in the order of their clips, not of their names: names depend on where the videos lie, and training on
    the same clips should not.
    """

    def look(row: dict[str, Any]) -> dict[str, Any]:
        uri = storage.join(folder, row["file"])
        first, latents = read_keys(uri)[0], read_latents(uri, shape)[0]
        order = {"uri": first.uri, "start": first.start, "mirrored": first.mirrored}
        return {**row, **order, "rows": len(latents), "sums": latent_sums(latents)}

    uris = storage.list_files(folder, (".parquet",)) if storage.exists(folder) else []
    if not uris:
        raise DataError(f"No clip could be encoded: see {ERRORS} beside {folder}.")
    files = [uri[len(folder.rstrip("/")) + 1 :] for uri in uris]
    parts = ray.data.from_items([{"file": f} for f in files]).map(look).take_all()
    parts.sort(key=lambda part: (part["uri"], part["start"], part["mirrored"]))
    return (
        [str(part["file"]) for part in parts],
        [int(part["rows"]) for part in parts],
        statistics_of([part["sums"] for part in parts]),
    )


if __name__ == "__main__":
    raise SystemExit(main(["encode", *sys.argv[1:]]))
