"""JEDi's distance between features of V-JEPA 2. Not the published metric, whose network is V-JEPA."""

from ardiff.metrics.distances import Polynomial
from ardiff.metrics.networks.vjepa2 import VJEPA2_EXTRACTOR
from ardiff.metrics.registry import MetricSpec, SetMetric, register_metric

register_metric(
    SetMetric(
        name="jedi-vjepa2",
        specs={
            "jedi": MetricSpec(
                network=VJEPA2_EXTRACTOR, feature="mean over tokens", resize="bilinear", distance=Polynomial()
            )
        },
    )
)
