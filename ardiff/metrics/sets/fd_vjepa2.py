"""The Frechet distance between V-JEPA 2 features of clips."""

from ardiff.metrics.distances import Frechet
from ardiff.metrics.networks.vjepa2 import VJEPA2_EXTRACTOR
from ardiff.metrics.registry import MetricSpec, SetMetric, register_metric

register_metric(
    SetMetric(
        name="fd-vjepa2",
        specs={
            "styleganv": MetricSpec(
                network=VJEPA2_EXTRACTOR, feature="mean over tokens", resize="bilinear", distance=Frechet(ddof=0)
            )
        },
    )
)
