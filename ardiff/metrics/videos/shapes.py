"""How well videos of the synthetic set keep their shape and move: see :mod:`ardiff.metrics.shapes`."""

from ardiff.metrics.registry import VideoMetric, register_metric
from ardiff.metrics.shapes import SHAPE_MEASURES
from ardiff.metrics.tracking import MOTION_CHECKS

for measure in SHAPE_MEASURES:
    # The vote over frames hides flicker, so it never stands for a set.
    is_detail = measure in MOTION_CHECKS or measure == "recognised"
    register_metric(VideoMetric(name=measure, higher_is_better=True, detail=is_detail))
