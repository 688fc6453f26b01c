"""Under what names Ray exports the endpoint's figures to Prometheus."""

from ardiff.serving.metrics import Measure


def exported(measure: Measure) -> set[str]:
    """The names of one figure. tests/ray/test_serve_deploy.py finds them at a real node."""
    match measure.kind:
        case "gauge":
            return {f"ray_{measure.name}"}
        case "counter":
            return {f"ray_{measure.name}_total"}
        case "histogram":
            return {f"ray_{measure.name}_{part}" for part in ("bucket", "sum", "count")}
