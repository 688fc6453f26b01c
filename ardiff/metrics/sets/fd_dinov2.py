"""The Frechet distance between DINOv2 features of all frames."""

from ardiff.metrics.distances import Frechet
from ardiff.metrics.networks.dinov2 import DINOV2_EXTRACTOR
from ardiff.metrics.registry import MetricSpec, SetMetric, register_metric

register_metric(
    SetMetric(
        name="fd-dinov2",
        specs={
            "styleganv": MetricSpec(
                network=DINOV2_EXTRACTOR,
                feature="class token, every frame",
                resize="bicubic-antialias",
                distance=Frechet(ddof=0),
            )
        },
    )
)
