"""Autoscaling policy of the endpoint. This module stays small because Serve's controller imports it."""

from typing import Any

from ray.serve.config import AutoscalingContext


def replicas_for_jobs(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """The number of running and queued jobs divided by ``target_ongoing_requests``.

    Serve's own policy counts HTTP requests, but a job outlives its request. Every replica reports its running jobs and
    the length of the shared queue. Serve applies the bounds and delays.
    """
    metrics = context.aggregated_metrics or {}
    running = sum(metrics.get("running", {}).values())
    waiting = max(metrics.get("waiting", {}).values(), default=0.0)
    assert context.config is not None
    return (running + waiting) / context.config.get_target_ongoing_requests(), {}
