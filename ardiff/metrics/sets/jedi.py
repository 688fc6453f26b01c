"""JEDi (Luo et al. 2025): a kernel distance between V-JEPA features of clips."""

from ardiff.metrics.distances import Polynomial
from ardiff.metrics.networks.vjepa import VJEPA_EXTRACTOR
from ardiff.metrics.registry import MetricSpec, SetMetric, register_metric

register_metric(
    SetMetric(
        name="jedi",
        specs={
            "jedi": MetricSpec(
                network=VJEPA_EXTRACTOR,
                feature="pooling of the Something-Something v2 probe",
                resize="bilinear",
                distance=Polynomial(),
            )
        },
    )
)
