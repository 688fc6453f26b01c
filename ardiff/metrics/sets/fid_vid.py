"""FID-vid: the Frechet distance between features of a 3-D ResNet-50, as in the authors' scripts."""

from ardiff.metrics.distances import Frechet
from ardiff.metrics.networks.resnet3d import RESNET3D_EXTRACTOR
from ardiff.metrics.registry import MetricSpec, SetMetric, register_metric

register_metric(
    SetMetric(
        name="fid-vid",
        specs={
            "ardiff-release": MetricSpec(
                network=RESNET3D_EXTRACTOR,
                feature="2048 pooled, mean over segments of 16 frames",
                resize="bicubic-antialias",
                reencode=True,
                distance=Frechet(ddof=1),
            )
        },
    )
)
