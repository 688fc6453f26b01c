"""Content-debiased FVD (Ge et al. 2024): the Frechet distance between VideoMAE features of clips."""

from ardiff.metrics.distances import Frechet
from ardiff.metrics.networks.videomae import VIDEOMAE_EXTRACTOR
from ardiff.metrics.registry import MetricSpec, SetMetric, register_metric

register_metric(
    SetMetric(
        name="cd-fvd",
        specs={
            "cd-fvd": MetricSpec(
                network=VIDEOMAE_EXTRACTOR,
                feature="mean over tokens, layer norm",
                resize="bilinear",
                distance=Frechet(ddof=0),
            )
        },
    )
)
