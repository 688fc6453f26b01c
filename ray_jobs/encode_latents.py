"""Encodes all clips of the training videos to latents: a Ray Data job that writes Parquet.

The set lies in a folder named by a fingerprint of the AR-VAE's weights and the preprocessing, so latents of another
model are never mistaken for these.

    python -m ray_jobs.encode_latents --config configs/quickstart/encode.yaml
"""

import hashlib
import sys
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.data import SaveMode

from ardiff.cli import main
from ardiff.config import fingerprint, to_yaml
from ardiff.data import storage
from ardiff.data.decode import decode_clips
from ardiff.data.latents import (
    DESCRIPTION,
    LatentSet,
    LatentStatistics,
    latent_table,
    read_description,
    read_latents,
    write_description,
)
from ardiff.data.manifest import VideoRecord, class_names, read_manifest, usable
from ardiff.data.transforms import to_unit
from ardiff.errors import DataError
from ardiff.pretrained import load_autoencoder
from ardiff.vae import AutoencoderConfig
from ray_jobs.common import ray_cluster, remote_progress, resolve_device, stage, telling


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
    clip_step: int = 8
    """Distance between the starts of two clips of a video."""
    batch_size: int = 16
    """Clips encoded at once by an actor."""
    max_actors: int = 1
    """Encoding actors; on a GPU cluster each takes one GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes GPUs where there are some."""

    def __post_init__(self) -> None:
        if min(self.num_frames, self.stride, self.clip_step, self.batch_size, self.max_actors) < 1:
            raise ValueError("num_frames, stride, clip_step, batch_size and max_actors must be at least 1")

    @property
    def span(self) -> int:
        """Video frames that a clip reaches over."""
        return (self.num_frames - 1) * self.stride + 1


def run(config: EncodeConfig, key: str = "") -> str:
    """Encodes, unless the same set is there already. Returns the set's folder. Raises ArdiffError."""
    records = usable(read_manifest(config.manifest), "train", config.span)
    model = load_autoencoder(config.vae).config
    name = fingerprint(
        _weights_hash(config.vae), config.num_frames, config.stride, config.clip_step, [r.uri for r in records]
    )
    folder = storage.join(config.output, name)
    with ray_cluster(), stage("encode", config.output, key) as record:
        if not storage.exists(storage.join(folder, DESCRIPTION)):
            _encode(config, model, records, folder, name)
            record.note = "encoded; "
        else:
            record.note = "already there; "
        description = read_description(folder)
        record.note += f"{sum(description.rows)} clips, latent std {description.statistics.std:.3f}"
        record.results = {"folder": folder}
    return folder


def _encode(config: EncodeConfig, model: AutoencoderConfig, records: list[VideoRecord], folder: str, name: str) -> None:
    device = resolve_device(config.device)
    todo = [{"uri": r.uri, "label": r.label, "frames": r.num_frames} for r in records]
    total = sum(len(_starts(config, r.num_frames)) for r in records)

    filesystem, path = storage.open_filesystem(folder)
    with remote_progress("encoding", total, "clip") as monitor:

        def decode(row: dict[str, Any]) -> list[dict[str, Any]]:
            starts = _starts(config, int(row["frames"]))
            with telling(monitor):
                try:
                    data = storage.read_bytes(row["uri"])
                    clips = decode_clips(data, starts, config.num_frames, config.stride, model.resolution)
                except DataError as error:
                    raise DataError(f"{row['uri']} cannot be decoded any more ({error}).") from error
            return [
                {"uri": row["uri"], "start": start, "label": row["label"], "video": clip}
                for start, clip in zip(starts, clips, strict=True)
            ]

        (
            ray.data.from_items(todo, override_num_blocks=min(16, len(todo)))
            .flat_map(decode)
            .map_batches(
                _Encoder,
                fn_constructor_args=(config.vae, device.type, monitor),
                batch_size=config.batch_size,
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=config.max_actors),
                num_gpus=1 if device.type == "cuda" else 0,
                num_cpus=1,
            )
            .write_parquet(path, filesystem=filesystem, mode=SaveMode.OVERWRITE)
        )
    # Not before: Ray Data empties the folder first.
    storage.write_bytes(storage.join(folder, "config.yaml"), to_yaml(config).encode())
    shape = (config.num_frames, model.num_tokens, model.token_dim)
    prefix = len(folder.rstrip("/")) + 1
    files = [uri[prefix:] for uri in storage.list_files(folder, (".parquet",))]
    rows, statistics = _statistics(folder, files, shape)
    if model.unit_latents:
        statistics = LatentStatistics.neutral(model.num_tokens, model.token_dim)
    names = class_names(read_manifest(config.manifest))
    write_description(folder, LatentSet(name, *shape, names, files, rows, statistics, storage.absolute(config.vae)))


class _Encoder:
    """An actor that holds the AR-VAE and encodes batches of clips to the posterior's mean."""

    def __init__(self, vae: str, device: str, monitor: Any) -> None:
        self.model, self.monitor = load_autoencoder(vae).to(device), monitor

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        video = to_unit(torch.from_numpy(np.ascontiguousarray(batch.pop("video"))).to(self.model.device))
        latents = self.model.latents(video).cpu().numpy()  # (n, F, L, D)
        self.monitor.add.remote(len(latents))
        return latent_table({**batch, "latents": latents})


def _statistics(folder: str, files: list[str], shape: tuple[int, int, int]) -> tuple[list[int], LatentStatistics]:
    """Rows per file, and the mean per token and channel and one standard deviation over all latents, in float64."""

    def sums(row: dict[str, Any]) -> dict[str, Any]:
        latents = read_latents(storage.join(folder, row["file"]), shape)[0].astype(np.float64)
        return {"rows": len(latents), "sum": latents.sum(axis=(0, 1)), "squares": (latents**2).sum(axis=(0, 1))}

    parts = ray.data.from_items([{"file": f} for f in files]).map(sums).take_all()
    rows = [int(part["rows"]) for part in parts]
    count = sum(rows) * shape[0]
    mean = np.sum([part["sum"] for part in parts], axis=0) / count  # (L, D)
    variance = np.sum([part["squares"] for part in parts], axis=0) / count - mean**2
    return rows, LatentStatistics(mean.tolist(), float(np.sqrt(variance.mean())))


def _starts(config: EncodeConfig, num_frames: int) -> list[int]:
    return list(range(0, num_frames - config.span + 1, config.clip_step))


def _weights_hash(vae: str) -> str:
    """Names the AR-VAE by the bytes of its configuration and weights."""
    digest = hashlib.sha256()
    for file in ("config.json", "vae.safetensors"):
        digest.update(storage.read_bytes(storage.join(vae, file)))
    return digest.hexdigest()


if __name__ == "__main__":
    raise SystemExit(main(["encode", *sys.argv[1:]]))
