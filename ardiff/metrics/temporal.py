"""How much the frames of videos change, compared with those of real videos. No labels and no weights are needed.

Shapes: V videos of k frames, D features per frame.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ardiff.errors import DataError
from ardiff.metrics.distances import CHUNK, Features
from ardiff.metrics.features import VideoFeatures
from ardiff.metrics.frechet import Moments
from ardiff.metrics.networks.random_frames import RANDOM_FRAMES_EXTRACTOR
from ardiff.metrics.registry import MetricSpec


@dataclass(frozen=True, slots=True)
class ChangeRatio:
    """The change of generated videos from frame to frame over that of real ones: 1 is as even as real videos.

    The change of a video is the root mean square, over frames and features, of the differences of ``order`` 1 or 2 of
    its frames' features, in standard deviations of the real frames. The score is the ratio of the means over videos.
    Features that hardly depend on where things are, such as averages over a frame, make it a measure of identity:
    things that turn into others raise it, motion hardly does. Videos that stand still have 0.
    """

    order: int
    ddof: ClassVar[int] = 0
    biased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(f"order must be 1 or 2, not {self.order}")

    def __call__(self, real: Features, fake: Features) -> float:
        """The ratio. Raises ValueError for too few frames or other widths, DataError if no real video changes."""
        x, y = VideoFeatures.wrap(real), VideoFeatures.wrap(fake)
        rows = (block.reshape(-1, block.shape[-1]) for block in x)
        moments = Moments.of_all(block[i : i + CHUNK] for block in rows for i in range(0, len(block), CHUNK))
        spread = np.sqrt(np.diag(moments.covariance(ddof=0)))  # (D,)
        scale = spread + 0.1 * spread.mean()  # a feature that hardly varies stays small
        change = self.changes(x, scale).mean()
        if not change > 0:
            raise DataError(
                "The real videos do not change from frame to frame, so the change of others cannot be compared with "
                "theirs: leave frame-difference and frame-second-difference out of the metrics."
            )
        return float(self.changes(y, scale).mean() / change)

    def changes(self, videos: Features, scale: np.ndarray) -> np.ndarray:
        """The change of each video, float64 ``(V,)``, with the features divided by ``scale``, ``(D,)``."""
        changes = []
        for block in VideoFeatures.wrap(videos):
            if block.ndim != 3 or block.shape[1] <= self.order or block.shape[2:] != scale.shape:
                raise ValueError(
                    f"expected features (V, k, {len(scale)}) of more than {self.order} frames, got {block.shape}"
                )
            differences = np.diff(block.astype(np.float64), n=self.order, axis=1) / scale
            changes.append(np.sqrt((differences**2).mean(axis=(1, 2))))
        return np.concatenate(changes)


def change_specs(order: int) -> dict[str, MetricSpec]:
    """How each protocol computes the :class:`ChangeRatio` of an order, from the features of every frame."""
    feature, distance = "32 pooled, every frame", ChangeRatio(order)
    return {
        "styleganv": MetricSpec(network=RANDOM_FRAMES_EXTRACTOR, feature=feature, resize="bilinear", distance=distance),
        "ardiff-release": MetricSpec(
            network=RANDOM_FRAMES_EXTRACTOR,
            feature=feature,
            resize="bicubic-antialias",
            reencode=True,
            distance=distance,
        ),
    }
