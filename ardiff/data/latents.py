"""Sets of latents: the Parquet files of the encode job, and their description."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ardiff.data import storage
from ardiff.data.tables import to_parquet
from ardiff.errors import ConfigError, DataError

DESCRIPTION = "latents.json"


@dataclass(frozen=True, slots=True)
class LatentStatistics:
    """Normalisation of latents for diffusion: the mean per token and channel, and one standard deviation.

    The standard deviation is one number, since a scale per dimension would amplify collapsed dimensions.
    """

    mean: list[list[float]]
    """``(L, D)``."""
    std: float

    @classmethod
    def neutral(cls, num_tokens: int, token_dim: int) -> LatentStatistics:
        """The identity, for an AR-VAE whose latents have length 1."""
        return cls([[0.0] * token_dim] * num_tokens, 1.0)

    def normalise(self, latents: Tensor) -> Tensor:
        """Latents ``(..., L, D)`` for the diffusion model."""
        return (latents - self._mean(latents)) / self.std

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of :meth:`normalise`."""
        return latents * self.std + self._mean(latents)

    def _mean(self, like: Tensor) -> Tensor:
        return torch.tensor(self.mean, dtype=like.dtype, device=like.device)


def latent_sums(latents: np.ndarray) -> np.ndarray:
    """Count of frames, sum and sum of squares of latents ``(n, F, L, D)``: float64 ``(3, L, D)``."""
    latents = latents.astype(np.float64)
    count = np.full(latents.shape[2:], latents.shape[0] * latents.shape[1], np.float64)
    return np.stack([count, latents.sum(axis=(0, 1)), (latents**2).sum(axis=(0, 1))])


def statistics_of(sums: Sequence[np.ndarray]) -> LatentStatistics:
    """The statistics, from results of :func:`latent_sums` in a fixed order."""
    count, total, squares = np.sum(sums, axis=0)
    mean = total / count
    return LatentStatistics(mean.tolist(), float(np.sqrt((squares / count - mean**2).mean())))


@dataclass(frozen=True, slots=True)
class LatentSet:
    """The description of a set of latents, stored as ``latents.json``, which is written last: it marks completeness."""

    fingerprint: str
    """Of the VAE weights and the preprocessing."""
    num_frames: int
    num_tokens: int
    token_dim: int
    class_names: list[str]
    files: list[str]
    """Parquet files of the training split, relative to the folder, each with columns ``latents`` and ``label``."""
    rows: list[int]
    """Clips in each file."""
    statistics: LatentStatistics
    vae: str
    """Folder of the VAE that made the latents."""
    vae_fingerprint: str = ""
    """Of the VAE's weights."""
    content: str = ""
    """Fingerprint of the clips and their order."""
    shapes: list[list[int]] = field(default_factory=list)
    """Height and width of each shape of frames, if there are several. The column ``shape`` of the files holds the index
    of each clip's."""


def vae_fingerprint(folder: str) -> str:
    """16 hex digits of a hash of an AR-VAE's configuration and weights."""
    digest = hashlib.sha256()
    for file in ("config.json", "vae.safetensors"):
        digest.update(storage.read_bytes(storage.join(folder, file)))
    return digest.hexdigest()[:16]


def check_vae(folder: str, description: LatentSet, vae: str) -> None:
    """Raises ConfigError if the latents in ``folder`` were not made by the AR-VAE in ``vae``."""
    stored, expected = description.vae_fingerprint or "unknown", vae_fingerprint(vae)
    if stored != expected:
        raise ConfigError(
            f"The latents in {folder} were made by the AR-VAE {stored} ({description.vae}), but {vae} is the AR-VAE "
            f"{expected}: run `ardiff encode` with it, and use the folder that it prints."
        )


def write_description(folder: str, description: LatentSet) -> None:
    """Writes ``latents.json``, which marks the set complete."""
    text = json.dumps(dataclasses.asdict(description), indent=1)
    storage.write_bytes(storage.join(folder, DESCRIPTION), text.encode())


def read_description(folder: str) -> LatentSet:
    """Reads ``latents.json``. Raises DataError if the set is not complete or the file is damaged."""
    uri = storage.join(folder, DESCRIPTION)
    if not storage.exists(uri):
        below = [file.uri for file in storage.list_objects(folder)] if storage.exists(folder) else []
        sets = [name.removesuffix(f"/{DESCRIPTION}") for name in below if name.endswith(f"/{DESCRIPTION}")]
        advice = f"give one of the sets below it, such as {sets[0]}" if sets else "run `ardiff encode` first"
        raise DataError(f"There is no complete set of latents in {folder}: {advice}.")
    try:
        fields: dict[str, Any] = json.loads(storage.read_bytes(uri))
        return LatentSet(**{**fields, "statistics": LatentStatistics(**fields["statistics"])})
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{uri} does not describe a set of latents ({error}): run `ardiff encode` again.") from error


def latent_table(columns: dict[str, Any]) -> pa.Table:
    """A table for Parquet, with ``latents`` float32 ``(n, F, L, D)`` as one flat list of fixed size per row."""
    latents = np.ascontiguousarray(columns["latents"], dtype=np.float32)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(latents.ravel()), latents[0].size)
    return pa.table({**columns, "latents": flat})


def read_latents(uri: str, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Reads one Parquet file: latents float32 ``(n, F, L, D)`` and labels int64 ``(n,)``; ``shape`` is ``(F, L, D)``.

    Raises DataError if the file cannot be read or holds latents of another size.
    """
    latents, columns = read_clips(uri, shape, ("label",))
    return latents, columns["label"].to_numpy()


def read_clips(uri: str, shape: tuple[int, int, int], names: Sequence[str]) -> tuple[np.ndarray, pa.Table]:
    """The latents of one Parquet file as :func:`read_latents` gives them, and other columns. Raises DataError."""
    data = storage.read_bytes(uri)
    try:
        table = pq.read_table(io.BytesIO(data), columns=["latents", *names])
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"Cannot read the latents {uri} ({error}): run `ardiff encode` again.") from error
    complete = table.num_columns == 1 + len(names)
    flat = table["latents"].combine_chunks().flatten().to_numpy() if complete else None
    if flat is None or len(flat) != len(table) * math.prod(shape):
        raise DataError(f"{uri} does not hold latents of shape {shape}: run `ardiff encode` again.")
    return flat.reshape(-1, *shape), table.select(names)


def latent_files(folder: str) -> list[str]:
    """The URIs of the Parquet files of a set, also of one that is not complete; without those of its texts."""
    if not storage.exists(folder):
        return []
    root = folder.rstrip("/")
    return [uri for uri in storage.list_files(root, (".parquet",)) if "/" not in uri.removeprefix(f"{root}/")]


@dataclass(frozen=True, slots=True)
class ClipKey:
    """The identity of a clip."""

    uri: str
    etag: str
    """Version of the video, to notice that its content or its filters have changed."""
    start: int
    """First frame of the clip, at the frame rate of the set."""
    mirrored: bool


KEYS = pa.schema({"uri": pa.string(), "etag": pa.string(), "start": pa.int64(), "mirrored": pa.bool_()})
LABELLED_KEYS = KEYS.append(pa.field("label", pa.int64()))


def read_keys(uri: str) -> list[ClipKey]:
    """The keys of the clips in one Parquet file, in its order. Raises DataError."""
    return [ClipKey(**row) for row in read_labelled_keys(uri).select(KEYS.names).to_pylist()]


def read_labelled_keys(uri: str) -> pa.Table:
    """Keys and labels of the clips in one Parquet file, in its order, as ``LABELLED_KEYS``. Raises DataError."""
    filesystem, path = storage.open_filesystem(uri)
    names = LABELLED_KEYS.names
    try:
        return pq.read_table(path, columns=names, filesystem=filesystem, schema=None).select(names).cast(LABELLED_KEYS)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(f"Cannot read the clips of {uri} ({error}): delete it to encode them again.") from error


def shard_name(keys: Sequence[ClipKey]) -> str:
    """The file name for these clips. Equal clips have equal names, so a repeated task replaces its file."""
    text = json.dumps([dataclasses.astuple(key) for key in keys])
    return f"part-{hashlib.sha256(text.encode()).hexdigest()[:16]}.parquet"


def write_shard(folder: str, columns: dict[str, Any]) -> str:
    """Writes one file of clips atomically. Returns its name.

    Args:
        folder: The set.
        columns: The fields of :class:`ClipKey`, ``label`` and ``latents`` float32 ``(n, F, L, D)``; of clips of several
            shapes also ``shape``.
    """
    rows = zip(*(columns[name] for name in KEYS.names), strict=True)
    name = shard_name([ClipKey(str(uri), str(etag), int(start), bool(m)) for uri, etag, start, m in rows])
    storage.write_bytes(storage.join(folder, name), to_parquet(latent_table(columns)))
    return name


def select_rows(uri: str, keep: np.ndarray) -> bytes:
    """The content of a file reduced to the clips where ``keep`` (bool) is true."""
    table = pq.read_table(io.BytesIO(storage.read_bytes(uri)))
    return to_parquet(table.filter(pa.array(keep)))
