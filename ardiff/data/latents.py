"""Sets of latents: Parquet files written by the encode job, and the description that says what is in them."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ardiff.data import storage
from ardiff.errors import DataError

DESCRIPTION = "latents.json"


@dataclass(frozen=True, slots=True)
class LatentStatistics:
    """How latents are normalised for diffusion: subtract the mean per token and channel, divide by one number.

    One number for all dimensions, because a scale per dimension would blow up dimensions that the AR-VAE collapsed.
    """

    mean: list[list[float]]
    """``(L, D)``."""
    std: float

    @classmethod
    def neutral(cls, num_tokens: int, token_dim: int) -> LatentStatistics:
        """Leaves latents as they are; for an AR-VAE whose latents have length 1."""
        return cls([[0.0] * token_dim] * num_tokens, 1.0)

    def normalise(self, latents: Tensor) -> Tensor:
        """Latents ``(..., L, D)`` as the diffusion model sees them."""
        return (latents - self._mean(latents)) / self.std

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of :meth:`normalise`."""
        return latents * self.std + self._mean(latents)

    def _mean(self, like: Tensor) -> Tensor:
        return torch.tensor(self.mean, dtype=like.dtype, device=like.device)


@dataclass(frozen=True, slots=True)
class LatentSet:
    """The description of a folder of latents, stored as ``latents.json``; written last, as the mark of completeness."""

    fingerprint: str
    """Names the VAE weights and the preprocessing that made the latents."""
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
    """Where the VAE that made the latents lies."""


def write_description(folder: str, description: LatentSet) -> None:
    """Writes ``latents.json``, which completes the set."""
    text = json.dumps(dataclasses.asdict(description), indent=1)
    storage.write_bytes(storage.join(folder, DESCRIPTION), text.encode())


def read_description(folder: str) -> LatentSet:
    """Reads ``latents.json`` of a complete set. Raises DataError if there is none, or it is damaged."""
    place = storage.join(folder, DESCRIPTION)
    if not storage.exists(place):
        raise DataError(f"No complete set of latents in {folder}: run `ardiff encode` first.")
    try:
        fields: dict[str, Any] = json.loads(storage.read_bytes(place))
        return LatentSet(**{**fields, "statistics": LatentStatistics(**fields["statistics"])})
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{place} does not describe a set of latents ({error}): run `ardiff encode` again.") from error


def latent_table(columns: dict[str, Any]) -> pa.Table:
    """A table for Parquet: ``latents`` float32 ``(n, F, L, D)`` is flattened to one fixed-size list per row."""
    latents = np.ascontiguousarray(columns["latents"], dtype=np.float32)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(latents.ravel()), latents[0].size)
    return pa.table({**columns, "latents": flat})


def read_latents(uri: str, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """One Parquet file as latents float32 ``(n, F, L, D)`` and labels int64 ``(n,)``; ``shape`` is ``(F, L, D)``.

    Raises DataError if it cannot be read, or holds latents of another size.
    """
    filesystem, path = storage.open_filesystem(uri)
    try:
        table = pq.read_table(path, columns=["latents", "label"], filesystem=filesystem)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"Cannot read the latents {uri} ({error}): run `ardiff encode` again.") from error
    flat = table["latents"].combine_chunks().flatten().to_numpy() if table.num_columns == 2 else None
    if flat is None or len(flat) != len(table) * math.prod(shape):
        raise DataError(f"{uri} does not hold latents of shape {shape}: run `ardiff encode` again.")
    return flat.reshape(-1, *shape), table["label"].to_numpy()
