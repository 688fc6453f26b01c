"""The first differences of neighbouring frames' features, over those of real clips: 1 is as even as real videos.

Things that turn into others raise it; videos that stand still have 0. It needs no labels and no weights.
"""

from ardiff.metrics.networks.random_frames import RANDOM_FRAMES_EXTRACTOR
from ardiff.metrics.registry import MetricSpec, SetMetric, register_metric
from ardiff.metrics.temporal import ChangeRatio

FEATURE = "32 pooled, every frame"

register_metric(
    SetMetric(
        name="frame-difference",
        ideal=1.0,
        specs={
            "styleganv": MetricSpec(
                network=RANDOM_FRAMES_EXTRACTOR, feature=FEATURE, resize="bilinear", distance=ChangeRatio(1)
            ),
            "ardiff-release": MetricSpec(
                network=RANDOM_FRAMES_EXTRACTOR,
                feature=FEATURE,
                resize="bicubic-antialias",
                reencode=True,
                distance=ChangeRatio(1),
            ),
        },
    )
)
