"""How many replicas the jobs of the endpoint need. Small on purpose: Serve's controller imports it."""

from typing import Any

from ray.serve.config import AutoscalingContext


def replicas_for_jobs(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Jobs in work and waiting, over ``target_ongoing_requests`` jobs a replica.

    Serve's own policy counts HTTP requests, but a job outlives the request that asked for it. Every replica tells the
    jobs it works on, and the length of the queue that all of them share. Bounds and delays are applied by Serve.
    """
    told = context.aggregated_metrics or {}
    working = sum(told.get("working", {}).values())
    waiting = max(told.get("waiting", {}).values(), default=0.0)
    assert context.config is not None
    return (working + waiting) / context.config.get_target_ongoing_requests(), {}
