"""The distance of the quick evaluation: the Frechet distance between features of a seeded random network.

Only the quick evaluation computes it, so no published protocol has a spec.
"""

from ardiff.metrics.registry import SetMetric, register_metric

register_metric(SetMetric(name="distance"))
