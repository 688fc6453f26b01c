"""Stored texts of a set of latents: token states of captions, and the captions of each video.

A set of texts is a folder ``text-<fingerprint of the encoder>`` in the folder of the latents. Each caption is stored
once, in one of the Parquet files with columns ``caption``, ``states`` (float16) and ``num_tokens``. An index file has a
row for each caption of each video, with the file and the row of its token states. ``texts.json``, written last, names
all files.

Shapes: n captions, m tokens of one caption, M of the longest, E width of a token state.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ardiff.config import fingerprint
from ardiff.data import storage
from ardiff.data.tables import to_parquet
from ardiff.errors import ConfigError, DataError

DESCRIPTION = "texts.json"
PREFIX = "text-"
SHARD_BYTES = 2**24
"""Token states in a file, about: what a loading task reads at once."""
SHARD_CAPTIONS = 4096
_READERS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class UsedEncoder:
    """The encoder of a set of texts."""

    uri: str
    """Folder, bucket or name."""
    fingerprint: str
    dim: int
    """Width of a token state, E."""
    max_tokens: int
    """Most tokens of a text."""
    dtype: str
    """Precision of its weights."""


@dataclass(frozen=True, slots=True)
class TextSet:
    """The description of a set of texts."""

    encoder: UsedEncoder
    longest: int
    """Tokens of the longest caption of a video, M: training pads all captions to it."""
    files: list[str]
    """Files with token states, relative to the folder."""
    index: str
    """File with the captions of each video."""
    content: str
    """Fingerprint of the videos and their captions, in order."""


class StoredCaption(NamedTuple):
    """Where the token states of a caption are stored."""

    file: str
    row: int
    num_tokens: int


def text_folder(latents: str, encoder: str) -> str:
    """The folder of the texts by the encoder with the fingerprint ``encoder``, in a folder of latents."""
    return storage.join(latents, f"{PREFIX}{encoder}")


def find_texts(latents: str, encoder: str = "") -> str:
    """The folder of the complete texts beside the latents; of the encoder with a fingerprint if there are several.

    Raises:
        ConfigError: There are none, or several and ``encoder`` is empty.
    """
    root = latents.rstrip("/")
    names = [file.removeprefix(f"{root}/").split("/") for file in storage.list_files(root, (f"/{DESCRIPTION}",))]
    fingerprints = [name[0].removeprefix(PREFIX) for name in names if len(name) == 2 and name[0].startswith(PREFIX)]
    if not fingerprints:
        raise ConfigError(
            f"There are no texts in {latents}: run `ardiff encode` with text.encoder, on a manifest with captions."
        )
    if encoder and encoder not in fingerprints:
        others = ", ".join(fingerprints)
        raise ConfigError(f"There are no texts by the encoder {encoder} in {latents}, only by {others}.")
    if not encoder and len(fingerprints) > 1:
        raise ConfigError(
            f"{latents} has texts by several encoders: set data.text_encoder to one of {', '.join(fingerprints)}."
        )
    return text_folder(root, encoder or fingerprints[0])


def read_texts(folder: str) -> TextSet:
    """The description of a set of texts. Raises DataError if the set is not complete or the file is damaged."""
    uri = storage.join(folder, DESCRIPTION)
    try:
        fields = json.loads(storage.read_bytes(uri))
        return TextSet(**{**fields, "encoder": UsedEncoder(**fields["encoder"])})
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{uri} does not describe a set of texts ({error}): run `ardiff encode` again.") from error


def state_bytes(num_tokens: int, dim: int) -> int:
    """Bytes of the stored token states of a caption, float16 ``(num_tokens, dim)``."""
    return 2 * num_tokens * dim


def shard_bounds(num_tokens: Sequence[int], dim: int) -> list[int]:
    """Splits captions into files: file ``i`` has the captions ``bounds[i]`` to ``bounds[i + 1]``.

    A file has about ``SHARD_BYTES``, and consecutive captions, so that those of neighbouring clips lie together.
    """
    bounds, size = [0], 0
    for index, count in enumerate(num_tokens):
        added = state_bytes(count, dim)
        if index > bounds[-1] and (size + added > SHARD_BYTES or index - bounds[-1] == SHARD_CAPTIONS):
            bounds.append(index)
            size = 0
        size += added
    return [*bounds, len(num_tokens)] if num_tokens else bounds


def write_text_shard(folder: str, captions: Sequence[str], states: Sequence[np.ndarray], dtype: str) -> str:
    """Writes the token states float16 ``(m, E)`` of captions atomically. Returns the file's name.

    Equal captions have equal names, so a repeated task replaces its file. ``dtype`` is the precision of the encoder's
    weights, which is part of the name.
    """
    counts = [len(rows) for rows in states]
    flat = pa.array(np.concatenate([rows.ravel() for rows in states]), pa.float16())
    offsets = np.concatenate([[0], np.cumsum([rows.size for rows in states])]).astype(np.int32)
    columns = {
        "caption": pa.array(captions, pa.string()),
        "states": pa.ListArray.from_arrays(pa.array(offsets), flat),
        "num_tokens": pa.array(counts, pa.int32()),
    }
    name = f"{_shard_prefix(dtype)}{hashlib.sha256(json.dumps(list(captions)).encode()).hexdigest()[:16]}.parquet"
    storage.write_bytes(storage.join(folder, name), to_parquet(pa.table(columns)))
    return name


def _shard_prefix(dtype: str) -> str:
    return f"part-{dtype}-"


def stored_captions(folder: str, dtype: str) -> dict[str, StoredCaption]:
    """The captions whose token states by an encoder of this precision are stored, also of a set that is not complete.

    Raises DataError.
    """
    if not storage.exists(folder):
        return {}
    uris = storage.list_files(folder, (".parquet",))
    files = [uri for uri in uris if uri.rpartition("/")[2].startswith(_shard_prefix(dtype))]

    def read(uri: str) -> pa.Table:
        filesystem, path = storage.open_filesystem(uri)
        try:
            return pq.read_table(path, columns=["caption", "num_tokens"], filesystem=filesystem)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"Cannot read the captions of {uri} ({error}): delete it to encode them again.") from error

    with ThreadPoolExecutor(_READERS) as pool:  # the threads wait for storage
        tables = list(pool.map(read, files))
    return {
        caption: StoredCaption(uri.rpartition("/")[2], row, count)
        for uri, table in zip(files, tables, strict=True)
        for row, (caption, count) in enumerate(zip(*(table[n].to_pylist() for n in table.column_names), strict=True))
    }


def read_index(folder: str, description: TextSet) -> pa.Table:
    """The index: columns ``uri`` and ``caption`` text, ``file`` and ``row`` int32. Rows of a video are consecutive."""
    return _read(storage.join(folder, description.index))


def write_texts(
    folder: str,
    encoder: UsedEncoder,
    captions: Mapping[str, Sequence[str]],
    stored: Mapping[str, StoredCaption],
) -> TextSet:
    """Writes the index and then the description, which marks the set complete.

    Args:
        folder: The set.
        encoder: What encoded the captions.
        captions: The captions of each video by URI.
        stored: Where the token states of each caption are.
    """
    rows = [(uri, caption, stored[caption]) for uri, texts in captions.items() for caption in texts]
    files = sorted({entry.file for _, _, entry in rows})
    number = {file: index for index, file in enumerate(files)}
    content = fingerprint([[uri, caption] for uri, caption, _ in rows])
    index = f"captions-{fingerprint(content, files)}.parquet"
    columns = {
        "uri": pa.array([uri for uri, _, _ in rows], pa.string()),
        "caption": pa.array([caption for _, caption, _ in rows], pa.string()),
        "file": pa.array([number[entry.file] for _, _, entry in rows], pa.int32()),
        "row": pa.array([entry.row for _, _, entry in rows], pa.int32()),
    }
    storage.write_bytes(storage.join(folder, index), to_parquet(pa.table(columns)))
    longest = max(entry.num_tokens for _, _, entry in rows)
    description = TextSet(encoder, longest, files, index, content)
    text = json.dumps(dataclasses.asdict(description), indent=1)
    storage.write_bytes(storage.join(folder, DESCRIPTION), text.encode())
    for uri in storage.list_files(folder, (".parquet",)):
        if (name := uri.rpartition("/")[2]).startswith("captions-") and name != index:
            storage.delete_file(uri)
    return description


@dataclass(frozen=True, slots=True, eq=False)
class TextIndex:
    """Finds captions of videos and reads their token states; the states are not kept.

    It holds 16 bytes per video and 8 per caption, as arrays that loading tasks share.
    """

    folder: str
    files: Sequence[str]
    shape: tuple[int, int]
    """``(M, E)``."""
    keys: np.ndarray
    """Hashes of the URIs of the videos, uint64, ascending."""
    bounds: np.ndarray
    """int64: the captions of video ``i`` are ``bounds[i]`` to ``bounds[i + 1]``."""
    file: np.ndarray
    """int32: the file of each caption."""
    row: np.ndarray
    """int32: its row in the file."""

    @property
    def caption_bytes(self) -> int:
        """Bytes of the padded token states of a caption."""
        return state_bytes(*self.shape)

    @classmethod
    def open(cls, folder: str, description: TextSet) -> TextIndex:
        """Reads the index of a set of texts. Raises DataError if it is damaged."""
        table = read_index(folder, description)
        uris = table["uri"].combine_chunks().dictionary_encode()
        keys, video = _hashes(uris.dictionary.to_pylist()), uris.indices.to_numpy()
        order = np.argsort(keys[video], kind="stable")  # the captions of a video keep their order
        unique, first = np.unique(keys[video][order], return_index=True)
        if len(unique) != len(keys):
            raise DataError(f"Two videos of {folder} have the same hash: rename one of them.")
        columns = (table[name].to_numpy()[order] for name in ("file", "row"))
        return cls(folder, description.files, (description.longest, description.encoder.dim), unique,
                   np.append(first, len(table)), *columns)  # fmt: skip

    def choose(self, uris: Sequence[str], uniform: np.ndarray) -> np.ndarray:
        """One caption of each video by a number from 0 to 1, ``uniform (n,)``: int64 ``(n,)``, -1 if it has none."""
        keys = _hashes(uris)
        video = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        start, end = self.bounds[video], self.bounds[video + 1]
        chosen = start + np.minimum((uniform * (end - start)).astype(np.int64), end - start - 1)
        return np.where(self.keys[video] == keys, chosen, -1)

    def load(self, captions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token states float16 ``(n, M, E)``, zero where padded, and mask bool ``(n, M)``, all False for caption -1.

        Reads one file at a time.
        """
        states = np.zeros((len(captions), *self.shape), np.float16)
        mask = np.zeros((len(captions), self.shape[0]), bool)
        file = np.where(captions < 0, -1, self.file[captions])
        for number in np.unique(file[file >= 0]).tolist():
            uri = storage.join(self.folder, self.files[number])
            stored = _read(uri)["states"].combine_chunks()
            ends, values = stored.offsets.to_numpy(), stored.values.to_numpy()
            for index in np.flatnonzero(file == number).tolist():
                row = int(self.row[captions[index]])
                tokens = values[ends[row] : ends[row + 1]].reshape(-1, self.shape[1])
                states[index, : len(tokens)] = tokens
                mask[index, : len(tokens)] = True
        return states, mask


def _hashes(uris: Sequence[str]) -> np.ndarray:
    digests = b"".join(hashlib.blake2b(uri.encode(), digest_size=8).digest() for uri in uris)
    return np.frombuffer(digests, np.uint64)


def _read(uri: str) -> pa.Table:
    try:
        return pq.read_table(io.BytesIO(storage.read_bytes(uri)))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"Cannot read the texts {uri} ({error}): run `ardiff encode` again.") from error
