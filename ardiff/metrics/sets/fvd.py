"""FVD (Unterthiner et al. 2018): the Frechet distance between I3D logits.

The protocols differ in how frames are resized, in the last pooling, in compression and in the covariances' divisor.
"""

from ardiff.metrics.distances import Frechet
from ardiff.metrics.networks.i3d import I3D_EXTRACTOR
from ardiff.metrics.registry import MetricSpec, SetMetric, register_metric

STYLEGANV = MetricSpec(
    network=I3D_EXTRACTOR,
    options={"pool_frames": 2},
    feature="400 logits, last pooling over 2 steps",
    resize="bilinear",
    distance=Frechet(ddof=0),
)
ARDIFF_RELEASE = MetricSpec(
    network=I3D_EXTRACTOR,
    options={"pool_frames": 1},
    feature="400 logits, last pooling over 1 step",
    resize="bicubic-antialias",
    reencode=True,
    distance=Frechet(ddof=1),
)

register_metric(SetMetric(name="fvd", specs={"styleganv": STYLEGANV, "ardiff-release": ARDIFF_RELEASE}))
