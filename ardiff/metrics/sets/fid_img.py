"""FID-img (Heusel et al. 2017): the Frechet distance between Inception features of all frames."""

from ardiff.metrics.distances import Frechet
from ardiff.metrics.networks.inception import INCEPTION_EXTRACTOR
from ardiff.metrics.registry import MetricSpec, SetMetric, register_metric

FEATURE = "2048 pooled, every frame"

register_metric(
    SetMetric(
        name="fid-img",
        specs={
            "styleganv": MetricSpec(
                network=INCEPTION_EXTRACTOR, feature=FEATURE, resize="tf-bilinear", distance=Frechet(ddof=0)
            ),
            "ardiff-release": MetricSpec(
                network=INCEPTION_EXTRACTOR,
                feature=FEATURE,
                resize="bicubic-antialias",
                reencode=True,
                distance=Frechet(ddof=1),
            ),
        },
    )
)
