"""The clips of a set of latents as integers, and which of them still agree with the manifest.

A clip's number holds the index of its video among the records, its first frame, and whether it is mirrored. One
integer per clip is all that the driver of the encode job keeps of it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ardiff.data.manifest import VideoRecord, class_names

START_BITS = 31
"""Bits for the first frame. The lowest bit says whether the clip is mirrored, the 31 bits on top are the video."""
CLIPS_PER_READ = 8
"""Most clips that one reading of a video decodes, which limits the memory of a task."""


def clip_numbers(video: int, starts: Sequence[int], mirrored: bool) -> np.ndarray:
    """The numbers of a video's clips, int64, ascending; with ``mirrored`` also those of the mirrored clips."""
    plain = (np.int64(video) << (START_BITS + 1)) + (np.array(starts, dtype=np.int64) << 1)
    return np.stack([plain, plain + 1], axis=1).reshape(-1) if mirrored else plain


def split_numbers(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Video indices, first frames and mirror flags of clips."""
    return numbers >> (START_BITS + 1), (numbers >> 1) & ((1 << START_BITS) - 1), numbers & 1


def reading_bounds(numbers: np.ndarray) -> np.ndarray:
    """Splits ascending ``numbers`` into readings of up to ``CLIPS_PER_READ`` clips of one video.

    Returns:
        Reading ``i`` has the clips ``bounds[i]`` to ``bounds[i + 1]``.
    """
    _, first, inverse = np.unique(numbers >> (START_BITS + 1), return_index=True, return_inverse=True)
    index = np.arange(len(numbers)) - first[inverse]
    return np.append(np.flatnonzero(index % CLIPS_PER_READ == 0), len(numbers))


@dataclass(frozen=True, slots=True)
class CurrentVideos:
    """The content and the labels of the manifest, with which stored clips must agree."""

    videos: dict[str, tuple[str, int] | None]
    """Version and label of every video; None for a video that is not for training."""
    same_class: list[bool]
    """For each class of the set, whether the manifest has the same class name."""

    @classmethod
    def of(cls, manifest: Sequence[VideoRecord], stored_classes: list[str]) -> "CurrentVideos":
        """``stored_classes`` are the class names of the set; empty if the set is not complete."""
        train = {
            r.uri: (r.version, r.label) if r.split == "train" and r.status != "skipped" else None for r in manifest
        }
        names = class_names(manifest)
        same = [stored_classes[i : i + 1] == names[i : i + 1] for i in range(len(stored_classes))]
        return cls(train, same)

    def agrees(self, uri: str, etag: str, label: int) -> bool:
        """Whether a stored clip may stay. If the manifest lacks its video, the class must be the same."""
        if uri in self.videos:
            return self.videos[uri] == (etag, label)
        return label < len(self.same_class) and self.same_class[label]


def stored_clips(
    files: Iterable[dict[str, Any]], records: Sequence[VideoRecord], current: CurrentVideos
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The clips of a set that stay.

    Args:
        files: For every file its URI ``file``, and ``uri``, ``etag``, ``label``, ``start`` and ``mirrored`` of its
            clips. Only their numbers are kept in memory.
        records: The videos to encode. Videos that are not among them get indices after them.
        current: The manifest.

    Returns:
        The numbers of the clips that stay, ascending; and by file which of its clips stay, bool. A clip that is stored
        twice stays once.
    """
    index = {record.uri: i for i, record in enumerate(records)}
    parts: dict[str, np.ndarray] = {}
    for columns in files:
        videos = [index.setdefault(str(uri), len(index)) for uri in columns["uri"]]
        clips = zip(columns["uri"], columns["etag"], columns["label"], strict=True)
        agrees = np.array([current.agrees(str(uri), str(etag), int(label)) for uri, etag, label in clips], dtype=bool)
        numbers = (np.array(videos, dtype=np.int64) << (START_BITS + 1)) + (np.array(columns["start"], np.int64) << 1)
        numbers += np.array(columns["mirrored"], dtype=np.int64)
        parts[columns["file"]] = np.where(agrees, numbers, -1)
    if not parts:
        return np.array([], dtype=np.int64), {}
    numbers, first = np.unique(np.concatenate(list(parts.values())), return_index=True)
    stays = np.zeros(sum(map(len, parts.values())), dtype=bool)
    stays[first[numbers >= 0]] = True
    ends = np.cumsum([len(part) for part in parts.values()])
    return numbers[numbers >= 0], dict(zip(parts, np.split(stays, ends[:-1]), strict=True))
