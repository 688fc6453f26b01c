"""The first differences of neighbouring frames' features, over those of real clips: 1 is as even as real videos.

Things that turn into others raise it; videos that stand still have 0. It needs no labels and no weights.
"""

from ardiff.metrics.registry import SetMetric, register_metric
from ardiff.metrics.temporal import change_specs

register_metric(SetMetric(name="frame-difference", ideal=1.0, specs=change_specs(1)))
