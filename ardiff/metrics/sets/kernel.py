"""The kernel distance between features from files; the features are those of the user, so no protocol has a spec."""

from ardiff.metrics.registry import SetMetric, register_metric

register_metric(SetMetric(name="kernel"))
