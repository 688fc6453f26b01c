"""The Frechet distance between CLIP features of all frames."""

from ardiff.metrics.distances import Frechet
from ardiff.metrics.networks.clip import CLIP_EXTRACTOR
from ardiff.metrics.registry import MetricSpec, SetMetric, register_metric

register_metric(
    SetMetric(
        name="fd-clip",
        specs={
            "styleganv": MetricSpec(
                network=CLIP_EXTRACTOR,
                feature="image embedding, every frame",
                resize="bicubic-antialias",
                distance=Frechet(ddof=0),
            )
        },
    )
)
