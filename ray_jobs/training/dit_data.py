"""Training data of the AR-DiT: stored latents, or clips that the AR-VAE encodes in every step."""

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import ray.data
import torch
from torch import Tensor

from ardiff.config import fingerprint
from ardiff.data import storage
from ardiff.data.bucket_stream import clip_stream
from ardiff.data.buckets import training_videos
from ardiff.data.latents import (
    LatentSet,
    LatentStatistics,
    check_vae,
    latent_sums,
    read_description,
    statistics_of,
    vae_fingerprint,
)
from ardiff.data.manifest import VideoRecord, class_names, content_of, manifest_table
from ardiff.data.streams import LatentStream, Stream
from ardiff.data.texts import TextIndex, TextSet, find_texts, read_texts, state_bytes
from ardiff.data.transforms import to_unit
from ardiff.errors import ConfigError
from ardiff.pretrained import load_autoencoder
from ray_jobs.runtime.cluster import resolve_device
from ray_jobs.runtime.error_log import Reporter
from ray_jobs.runtime.progress import remote_progress, report_errors
from ray_jobs.training.batches import load_chunk
from ray_jobs.training.config import TrainDiTConfig

MAX_CHUNK_TEXT_BYTES = 2**30
"""Most bytes of token states in a chunk of a stream."""


def stored_latents(config: TrainDiTConfig) -> LatentSet:
    """The stored latents, with the AR-VAE for the pipeline. Raises ConfigError if another AR-VAE encoded them."""
    latents = read_description(config.latents)
    vae = config.data.vae or latents.vae
    if config.data.vae or latents.vae_fingerprint:
        check_vae(config.latents, latents, vae)
    return replace(latents, vae=storage.absolute(vae))


def latents_of_clips(config: TrainDiTConfig, manifest: list[VideoRecord]) -> tuple[LatentSet, list[VideoRecord]]:
    """The description that stored latents of the training videos would have, and the videos."""
    clips, vae = config.data.clips, load_autoencoder(config.data.vae).config
    records = training_videos(manifest, clips)
    key, uri = vae_fingerprint(config.data.vae), storage.absolute(config.data.vae)
    neutral = LatentStatistics.neutral(vae.num_tokens, vae.token_dim)
    shape = (max(clips.all_lengths), vae.num_tokens, vae.token_dim)
    names, shapes = class_names(manifest), vae.described_shapes
    return LatentSet(key, *shape, names, [], [], neutral, uri, key, shapes=shapes), records


def check_sizes(config: TrainDiTConfig, latents: LatentSet) -> None:
    """Raises ConfigError, with the configuration keys, if the model does not fit the latents."""
    data = config.latents if config.data.source == "latents" else config.data.clips.manifest
    for name in ("num_tokens", "token_dim"):
        if (value := getattr(config.dit, name)) != (expected := getattr(latents, name)):
            raise ConfigError(f"dit.{name} is {value}, but the latents of {data} have {expected}.")
    if config.dit.num_frames < latents.num_frames:
        raise ConfigError(
            f"dit.num_frames is {config.dit.num_frames}, but the clips of {data} have {latents.num_frames} frames."
        )
    if config.dit.num_classes not in (0, len(latents.class_names)):
        raise ConfigError(
            f"dit.num_classes is {config.dit.num_classes}, but {data} has {len(latents.class_names)} classes "
            "(0 trains without classes)."
        )


def with_shapes(config: TrainDiTConfig, latents: LatentSet) -> TrainDiTConfig:
    """The configuration whose AR-DiT knows the shapes of the latents' frames. Raises ConfigError."""
    shapes = max(len(latents.shapes), 1)
    if config.dit.num_shapes not in (1, shapes):
        raise ConfigError(f"dit.num_shapes is {config.dit.num_shapes}, but the AR-VAE knows {shapes}: leave it out.")
    try:
        return replace(config, dit=replace(config.dit, num_shapes=shapes))
    except ValueError as error:
        raise ConfigError(f"dit: {error}.") from error


def stored_texts(config: TrainDiTConfig, latents: LatentSet) -> tuple[str, TextSet] | None:
    """The folder and description of the texts that a model with text trains with; None for a model without.

    Raises:
        ConfigError: There are none, they have another width than ``dit.condition_dim``, or the token states that are
            loaded together need too much memory.
    """
    if not config.dit.text:
        return None
    folder = find_texts(config.latents, config.data.text_encoder)
    texts = read_texts(folder)
    if config.dit.condition_dim != texts.encoder.dim:
        raise ConfigError(
            f"dit.condition_dim is {config.dit.condition_dim}, but the token states of the text encoder "
            f"{texts.encoder.uri} have width {texts.encoder.dim}."
        )
    clips = max(latents.rows) * min(config.files_per_chunk, len(latents.files))
    if (size := clips * state_bytes(texts.longest, texts.encoder.dim)) > MAX_CHUNK_TEXT_BYTES:
        raise ConfigError(
            f"The captions of the {clips} clips that are loaded together need {size / 2**20:.0f} MiB, more than "
            f"{MAX_CHUNK_TEXT_BYTES / 2**20:.0f}: lower files_per_chunk, or encode with a smaller clips_per_file or "
            "text.max_tokens."
        )
    return folder, texts


def make_stream(
    config: TrainDiTConfig,
    latents: LatentSet,
    records: list[VideoRecord],
    texts: tuple[str, TextSet] | None,
    report: Reporter | None,
) -> tuple[Stream, str]:
    """The stream of training samples, and a fingerprint of everything that determines their content and order.

    Args:
        records: Training videos; none for stored latents.
        texts: From :func:`stored_texts`.
        report: Records bad videos.
    """
    seed, clips = config.train.seed, config.data.clips
    if records:
        shapes = load_autoencoder(config.data.vae).config.shapes
        if clips.buckets or clips.auto_buckets:
            raise ConfigError("data.clips.buckets follows from the AR-VAE: leave it and auto_buckets out.")
        key = fingerprint(clips.resume_key, content_of(records), config.data.statistics_clips, latents.fingerprint)
        return clip_stream(manifest_table(records), clips, shapes, seed, config.train.batch_size, report), key
    files = [storage.join(config.latents, file) for file in latents.files]
    shape = (latents.num_frames, latents.num_tokens, latents.token_dim)
    key, index = fingerprint(config.files_per_chunk, latents.fingerprint, latents.content), None
    if texts is not None:
        folder, description = texts
        key = fingerprint(key, description.encoder.fingerprint, description.content)
        index = TextIndex.open(folder, description)
    several = config.dit.num_shapes > 1
    return LatentStream(files, latents.rows, shape, seed, config.files_per_chunk, index, several), key


def clip_statistics(config: TrainDiTConfig, stream: Stream, source: str) -> LatentStatistics:
    """Mean and standard deviation of the latents of the first clips, cached in the run's folder for resumed runs.

    Args:
        source: Fingerprint of the stream. Cached statistics of another stream are computed again.
    """
    uri, key = storage.join(config.output, "statistics.json"), fingerprint(source, config.train.seed)
    if config.resume != "none" and storage.exists(uri):
        cached = json.loads(storage.read_bytes(uri))
        if cached.pop("source", "") == key:
            return LatentStatistics(**cached)
    chunks = range(stream.locate(config.data.statistics_clips - 1)[0] + 1)
    with remote_progress("statistics", len(chunks), "chunk") as progress:
        device = resolve_device(config.train.device).type

        def encode(row: dict[str, Any]) -> dict[str, Any]:
            chunk = int(row["id"])
            rows = np.arange(stream.start(chunk + 1) - stream.start(chunk))
            with report_errors(progress):
                samples = load_chunk(stream, chunk, rows, progress, f"chunk {chunk}")
                latents = clip_encoder(config.data.vae)(torch.from_numpy(samples["video"]).to(device))
            progress.add.remote(1)
            return {"sums": latent_sums(latents.cpu().double().numpy())}

        numbers = ray.data.range(len(chunks), override_num_blocks=len(chunks))
        encoded = numbers.map(encode, num_gpus=1 if device == "cuda" else 0).take_all()
    statistics = statistics_of([row["sums"] for row in encoded])
    storage.write_bytes(uri, json.dumps({"source": key, **asdict(statistics)}).encode())
    return statistics


@functools.lru_cache(maxsize=1)
def clip_encoder(vae: str) -> Callable[[Tensor], Tensor]:
    """A function from video, uint8 ``(B, F, H, W, 3)``, to the mean of its latents, float32 ``(B, F, L, D)``.

    It runs on the device of the video.
    """
    model = load_autoencoder(vae).requires_grad_(False)

    @torch.no_grad()
    def encode(video: Tensor) -> Tensor:
        return model.to(video.device).latents(to_unit(video)).float()

    return encode
