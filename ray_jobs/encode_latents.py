"""Encodes clips of the training videos to latents: a Ray Data job that writes Parquet.

The set lies in a folder named by a fingerprint of the AR-VAE's weights and the preprocessing, so latents of another
model are never mistaken for these. Only clips that are not in it yet are encoded: new videos, more offsets or mirrored
copies extend it. A file of clips is written whole or not at all, so a kill loses the files in flight and no more.

    ardiff encode --config configs/quickstart/encode.yaml
"""

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import ray
import ray.data
import torch

from ardiff.cli import main
from ardiff.config import fingerprint, to_yaml
from ardiff.data import storage
from ardiff.data.clips import read_clips
from ardiff.data.decode import crop_square
from ardiff.data.latents import (
    DESCRIPTION,
    ClipKey,
    LatentSet,
    LatentStatistics,
    latent_sums,
    read_description,
    read_keys,
    read_latents,
    statistics_of,
    vae_fingerprint,
    without,
    write_description,
    write_shard,
)
from ardiff.data.manifest import VideoRecord, class_names, read_manifest, usable
from ardiff.data.quarantine import ERRORS, bad_clip
from ardiff.data.transforms import to_unit
from ardiff.errors import ConfigError, DataError, DecodeError, StorageError
from ardiff.pretrained import load_autoencoder
from ardiff.vae import AutoencoderConfig
from ray_jobs.common import await_resource, ray_cluster, remote_progress, resolve_device, say, stage, telling
from ray_jobs.quarantine import Reporter, quarantine


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
    records = usable(read_manifest(config.manifest), "train", config.span, config.fps)
    model = load_autoencoder(config.vae).config
    weights = vae_fingerprint(config.vae)
    name = fingerprint(weights, config.num_frames, config.stride, config.fps)
    folder = storage.absolute(storage.join(config.output, name))
    shape = (config.num_frames, model.num_tokens, model.token_dim)
    with ray_cluster(config.max_actors + 3), stage("encode", config.output, key) as record:
        wanted = {key: r for r in records for key in _keys(config, r)}
        present = _present(folder, {r.uri: r.etag for r in records})
        missing = [k for k in wanted if k not in present]
        with quarantine(config.output, len(wanted), config.max_bad_fraction, "clip", afresh=True) as bad:
            if missing:
                _encode(config, model, folder, missing, wanted, bad)
        if missing or not storage.exists(storage.join(folder, DESCRIPTION)):
            storage.write_bytes(storage.join(folder, "config.yaml"), to_yaml(config).encode())
            files, rows, statistics = _statistics(folder, shape)
            if model.unit_latents:
                statistics = LatentStatistics.neutral(model.num_tokens, model.token_dim)
            names = class_names(read_manifest(config.manifest))
            content = fingerprint(files, rows)
            write_description(
                folder,
                LatentSet(name, *shape, names, files, rows, statistics, storage.absolute(config.vae), weights, content),
            )
        description = read_description(folder)
        if others := len(present - wanted.keys()):
            say(f"{others} clips of the set are of other offsets, mirrored, or of videos that the manifest lacks now")
        count = sum(description.rows)
        record.note = f"{len(missing)} clips encoded, {len(wanted) - len(missing)} were there; "
        record.note += f"{count} clips, latent std {description.statistics.std:.3f}"
        record.results = {"folder": folder}
    return folder


def _keys(config: EncodeConfig, record: VideoRecord) -> list[ClipKey]:
    starts = config.starts(record.length_at(config.fps))
    mirrors = (False, True) if config.mirrored else (False,)
    return [ClipKey(record.uri, record.etag, start, mirror) for start in starts for mirror in mirrors]


def _present(folder: str, etags: dict[str, str]) -> set[ClipKey]:
    """The clips that the set has; those of videos that have changed since are taken out of it first."""
    files = storage.list_files(folder, (".parquet",)) if storage.exists(folder) else []
    if not files:
        return set()

    def look(row: dict[str, Any]) -> dict[str, Any]:
        return {"file": row["file"], "keys": [dataclasses.astuple(k) for k in read_keys(row["file"])]}

    present: set[ClipKey] = set()
    for row in ray.data.from_items([{"file": f} for f in files]).map(look).iter_rows():
        keys = [ClipKey(str(u), str(e), int(s), bool(m)) for u, e, s, m in row["keys"]]
        stale = {k for k in keys if k.etag != etags.get(k.uri, k.etag)} | (set(keys) & present)
        if stale:
            # The description counts rows, so the set is not complete from here on.
            storage.delete_file(storage.join(folder, DESCRIPTION))
            rest = without(row["file"], stale)
            if rest is None:
                storage.delete_file(row["file"])
            else:
                storage.write_bytes(row["file"], rest)
        present |= set(keys) - stale
    return present


def _encode(
    config: EncodeConfig,
    model: AutoencoderConfig,
    folder: str,
    missing: list[ClipKey],
    records: dict[ClipKey, VideoRecord],
    report: Reporter,
) -> None:
    device = resolve_device(config.device)
    _check_room(config, device)
    with remote_progress("encoding", len(missing), "clip") as monitor:

        def decode(row: dict[str, Any]) -> list[dict[str, Any]]:
            with telling(monitor):
                return _decode(config, model.resolution, row, report)

        def write(batch: Any) -> Any:
            with telling(monitor):
                name = write_shard(folder, batch)
            monitor.add.remote(len(batch["start"]))
            return {"file": [name]}

        readings = _readings(missing, records)
        files = (
            ray.data.from_items(readings, override_num_blocks=min(max(len(readings) // 4, 16), 1024, len(readings)))
            .flat_map(decode)
            .map_batches(
                _Encoder,
                fn_constructor_args=(config.vae, device.type),
                batch_size=config.batch_size,
                compute=ray.data.ActorPoolStrategy(min_size=config.min_actors, max_size=config.max_actors),
                num_gpus=1 if device.type == "cuda" else 0,
                num_cpus=1,
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


def _readings(missing: list[ClipKey], records: dict[ClipKey, VideoRecord]) -> list[dict[str, Any]]:
    """The missing clips in portions that one reading of a video gives, neighbours together."""
    rows: list[dict[str, Any]] = []
    for key in missing:
        last = rows[-1] if rows else None
        if last is None or last["record"]["uri"] != key.uri or len(last["starts"]) == CLIPS_PER_READ:
            last = {"record": dataclasses.asdict(records[key]), "starts": [], "mirrored": []}
            rows.append(last)
        last["starts"].append(key.start)
        last["mirrored"].append(key.mirrored)
    return rows


def _decode(config: EncodeConfig, resolution: int, row: dict[str, Any], report: Reporter) -> list[dict[str, Any]]:
    """The clips of one reading, each as a row; those that cannot be decoded are told to ``report``."""
    record = VideoRecord(**row["record"])
    starts, mirrored = [int(s) for s in row["starts"]], [bool(m) for m in row["mirrored"]]
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
                report(bad_clip(record.uri, portion[0], error))
            continue
        clips |= {start: crop_square(clip, resolution) for start, clip in zip(portion, found, strict=True)}
    known = {"uri": record.uri, "etag": record.etag, "label": record.label}
    return [
        {**known, "start": start, "mirrored": mirror, "video": clips[start][:, :, ::-1] if mirror else clips[start]}
        for start, mirror in zip(starts, mirrored, strict=True)
        if start in clips
    ]


class _Encoder:
    """An actor that holds the AR-VAE and encodes batches of clips to the posterior's mean."""

    def __init__(self, vae: str, device: str) -> None:
        self.model = load_autoencoder(vae).to(device)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        video = to_unit(torch.from_numpy(np.ascontiguousarray(batch.pop("video"))).to(self.model.device))
        return {**batch, "latents": self.model.latents(video).float().cpu().numpy()}  # (n, F, L, D)


def _statistics(folder: str, shape: tuple[int, int, int]) -> tuple[list[str], list[int], LatentStatistics]:
    """The files of a set, their rows, and over all latents the mean per token and channel and one deviation."""

    def sums(row: dict[str, Any]) -> dict[str, Any]:
        latents = read_latents(storage.join(folder, row["file"]), shape)[0]
        return {"rows": len(latents), "sums": latent_sums(latents)}

    uris = storage.list_files(folder, (".parquet",)) if storage.exists(folder) else []
    if not uris:
        raise DataError(f"No clip could be encoded: see {ERRORS} beside {folder}.")
    files = [uri[len(folder.rstrip("/")) + 1 :] for uri in uris]
    parts = ray.data.from_items([{"file": f} for f in files]).map(sums).take_all()
    return files, [int(part["rows"]) for part in parts], statistics_of([part["sums"] for part in parts])


if __name__ == "__main__":
    raise SystemExit(main(["encode", *sys.argv[1:]]))
