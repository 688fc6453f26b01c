"""Encodes the captions of videos: each distinct caption once, on Ray, by actors that write Parquet files."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray
import ray.data
import torch

from ardiff.data import storage
from ardiff.data.manifest import VideoRecord
from ardiff.data.texts import (
    DESCRIPTION,
    StoredCaption,
    TextSet,
    UsedEncoder,
    read_index,
    read_texts,
    shard_bounds,
    stored_captions,
    text_folder,
    write_text_shard,
    write_texts,
)
from ardiff.errors import ConfigError, DataError
from ardiff.text.config import TextConfig
from ardiff.text.encoder import TextEncoder, TextTokenizer
from ray_jobs.runtime.crash_guard import TASK_RETRIES
from ray_jobs.runtime.progress import remote_progress, report_errors


def read_tokenizer(config: TextConfig, records: Sequence[VideoRecord]) -> TextTokenizer | None:
    """The tokenizer of the encoder, None without one. Finds what is wrong before any clip is encoded.

    Raises:
        ArdiffError: There is no encoder, no video has a caption, or a caption is too long and may not be truncated.
    """
    if config.encoder is None:
        return None
    tokenizer = TextTokenizer.load(config.encoder, config.max_tokens)
    captions = _distinct(records)
    if not captions:
        raise DataError(
            "No training video has a caption: see docs/data.md for `ardiff prepare`, or unset text.encoder."
        )
    if config.too_long == "error":
        counts = zip(captions, tokenizer.lengths(captions), strict=True)
        if longer := [caption for caption, count in counts if count > tokenizer.max_tokens]:
            raise DataError(
                f"{len(longer)} captions have more than the {tokenizer.max_tokens} tokens of the encoder or of "
                f"text.max_tokens, such as '{longer[0]:.80}': shorten them, or set text.too_long=truncate."
            )
    return tokenizer


def encode_texts(
    config: TextConfig,
    tokenizer: TextTokenizer,
    latents: str,
    manifest: Sequence[VideoRecord],
    records: Sequence[VideoRecord],
    actors: ray.data.ActorPoolStrategy,
    device: str,
) -> str:
    """Encodes the captions that the set of texts beside the latents lacks. Returns a note with counts.

    Args:
        config: The encoder.
        tokenizer: From :func:`read_tokenizer`.
        latents: Folder of the latents.
        manifest: All videos.
        records: Those whose clips are encoded.
        actors: The actors that encode.
        device: Where they encode.

    Raises:
        ConfigError: The set has captions that were encoded in another precision.
    """
    folder = text_folder(latents, tokenizer.fingerprint)
    encoder = UsedEncoder(
        uri=storage.absolute(tokenizer.uri) if tokenizer.folder == Path(tokenizer.uri) else tokenizer.uri,
        fingerprint=tokenizer.fingerprint,
        dim=tokenizer.dim,
        max_tokens=tokenizer.max_tokens,
        dtype=config.dtype,
    )
    earlier = read_texts(folder) if storage.exists(storage.join(folder, DESCRIPTION)) else None
    if earlier is not None and earlier.encoder.dtype != config.dtype:
        dtype = earlier.encoder.dtype
        raise ConfigError(f"{folder} has captions encoded in {dtype}: set text.dtype={dtype}, or delete the folder.")
    captions = {r.uri: r.captions for r in records if r.captions}
    if earlier is not None:
        captions |= _captions_of_others(folder, earlier, manifest)
    distinct = list(dict.fromkeys(caption for texts in captions.values() for caption in texts))
    counts = dict(zip(distinct, tokenizer.lengths(distinct), strict=True))
    stored = stored_captions(folder, config.dtype)
    missing = [caption for caption in distinct if caption not in stored]
    if missing:
        sizes = [min(counts[caption], tokenizer.max_tokens) for caption in missing]
        stored |= _encode(config, folder, missing, sizes, tokenizer.dim, actors, device)
    write_texts(folder, encoder, captions, stored)
    note = f"{len(missing)} captions encoded, {len(distinct) - len(missing)} were there"
    if longer := sum(count > tokenizer.max_tokens for count in counts.values()):
        note += f", {longer} truncated to {tokenizer.max_tokens} tokens"
    return f"{note}; {sum(not r.captions for r in records)} of {len(records)} videos have none"


def _distinct(records: Sequence[VideoRecord]) -> list[str]:
    return list(dict.fromkeys(caption for record in records for caption in record.captions))


def _captions_of_others(folder: str, earlier: TextSet, manifest: Sequence[VideoRecord]) -> dict[str, tuple[str, ...]]:
    """The stored captions of videos that the manifest lacks, whose clips stay in the set of latents."""
    known, others = {r.uri for r in manifest}, dict[str, tuple[str, ...]]()
    for row in read_index(folder, earlier).to_pylist():
        if row["uri"] not in known:
            others[row["uri"]] = (*others.get(row["uri"], ()), row["caption"])
    return others


def _encode(
    config: TextConfig,
    folder: str,
    captions: Sequence[str],
    counts: Sequence[int],
    dim: int,
    actors: ray.data.ActorPoolStrategy,
    device: str,
) -> dict[str, StoredCaption]:
    """Encodes captions with these numbers of tokens. Returns where they are stored."""
    bounds = shard_bounds(counts, dim)
    shared = ray.put(captions)
    encoded: dict[str, StoredCaption] = {}
    with remote_progress("encoding captions", len(captions), "caption") as progress:
        shards = ray.data.from_items([{"start": s, "end": e} for s, e in pairwise(bounds)])
        written = shards.map(
            _Encoder,  # type: ignore[arg-type]  # Ray makes an actor of the class
            fn_constructor_args=(config, device, folder, shared, progress),
            compute=actors,
            num_gpus=1 if device == "cuda" else 0,
            num_cpus=1,
            max_task_retries=TASK_RETRIES,
        )
        for shard in written.iter_rows():
            for row in range(shard["end"] - shard["start"]):
                index = shard["start"] + row
                encoded[captions[index]] = StoredCaption(shard["file"], row, counts[index])
    return encoded


class _Encoder:
    """An actor that encodes the captions of one file and writes it."""

    def __init__(self, config: TextConfig, device: str, folder: str, captions: Any, progress: Any) -> None:
        assert config.encoder is not None
        with report_errors(progress):
            dtype = getattr(torch, config.dtype)
            self.encoder = TextEncoder.load(config.encoder, device, dtype, config.max_tokens)
        self.config, self.folder, self.progress = config, folder, progress
        self.captions = ray.get(captions)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        captions = self.captions[row["start"] : row["end"]]
        with report_errors(self.progress):
            states = self.encoder.stored_states(captions, self.config.batch_size)
            name = write_text_shard(self.folder, captions, states, self.config.dtype)
        self.progress.add.remote(len(captions))
        return {**row, "file": name}
