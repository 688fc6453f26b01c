"""How well videos of the captioned synthetic set follow their prompts: see :mod:`ardiff.metrics.prompts`."""

from ardiff.metrics.prompts import PROMPT_MEASURES
from ardiff.metrics.registry import VideoMetric, register_metric

for measure in PROMPT_MEASURES:
    register_metric(VideoMetric(name=measure, higher_is_better=True, detail=measure != "prompt followed"))
