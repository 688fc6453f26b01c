"""The second differences of neighbouring frames' features, over those of real clips: 1 is as even as real videos.

It sees shaking and flicker, and no steady change. It needs no labels and no weights.
"""

from ardiff.metrics.registry import SetMetric, register_metric
from ardiff.metrics.temporal import change_specs

register_metric(SetMetric(name="frame-second-difference", ideal=1.0, specs=change_specs(2)))
