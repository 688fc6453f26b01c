"""KVD: the kernel distance between the features of FVD."""

from dataclasses import replace

from ardiff.metrics.distances import Kernel
from ardiff.metrics.registry import SetMetric, register_metric
from ardiff.metrics.sets import fvd

register_metric(
    SetMetric(
        name="kvd",
        specs={
            "styleganv": replace(fvd.STYLEGANV, distance=Kernel()),
            "ardiff-release": replace(fvd.ARDIFF_RELEASE, distance=Kernel()),
        },
    )
)
