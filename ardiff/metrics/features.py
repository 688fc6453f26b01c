"""Features of videos, read block by block so that only one block is in memory at a time.

Shapes: V videos of k rows each (1 for a feature per video, the frames for a feature per frame), D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class VideoFeatures:
    """Features of videos, or of a selection of them."""

    blocks: Callable[[], Iterable[np.ndarray]]
    """Returns a new iterator over blocks of videos, floating point ``(v, k, D)`` each."""
    indices: np.ndarray
    """The selected videos, int ``(V,)``; an index may occur several times."""

    @classmethod
    def of(cls, blocks: Callable[[], Iterable[np.ndarray]], count: int) -> VideoFeatures:
        """All ``count`` videos of the blocks."""
        return cls(blocks, np.arange(count))

    @classmethod
    def wrap(cls, features: VideoFeatures | np.ndarray) -> VideoFeatures:
        """Features that may be an array ``(V, k, D)``."""
        return cls.of(lambda: [features], len(features)) if isinstance(features, np.ndarray) else features

    @classmethod
    def union(cls, selections: Sequence[VideoFeatures]) -> VideoFeatures:
        """The videos of several selections of the same features."""
        return cls(selections[0].blocks, np.concatenate([selection.indices for selection in selections]))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, selection: Sequence[int] | np.ndarray | slice) -> VideoFeatures:
        """Some of the videos."""
        return VideoFeatures(self.blocks, self.indices[selection])

    def __iter__(self) -> Iterator[np.ndarray]:
        """Blocks ``(v, k, D)`` of the selected videos, in the order of the blocks and not of ``indices``."""
        repeats = np.bincount(self.indices) if len(self.indices) else np.zeros(0, int)
        first = 0
        for block in self.blocks():
            if first >= len(repeats):
                return
            block_repeats = repeats[first : first + len(block)]
            first += len(block)
            if block_repeats.any():
                yield block[: len(block_repeats)].repeat(block_repeats, axis=0)

    def array(self) -> np.ndarray:
        """All features in memory, ``(V, k, D)``."""
        return np.concatenate(list(self))

    @property
    def width(self) -> int:
        """Features of a row, D. Raises ValueError if there is no video."""
        for block in self:
            return block.shape[2]
        raise ValueError("there are no videos")

    @property
    def depth(self) -> int:
        """Rows of a video, k. Raises ValueError if there is no video."""
        for block in self:
            return block.shape[1]
        raise ValueError("there are no videos")
