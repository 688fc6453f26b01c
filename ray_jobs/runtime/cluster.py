"""The Ray cluster: a job joins one or starts one on this machine, and waits for the resources it needs."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import ray
import ray.data
import torch
from ray.util.placement_group import placement_group, remove_placement_group

from ardiff import logs
from ardiff.data import s3
from ardiff.errors import ArdiffError
from ray_jobs.runtime.console import print_line

HERE = {
    # Without a dashboard, Ray Train's state actor would look for one without end.
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an actor that waits for this machine to be taken away
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how late the end of a training run may be noticed
    "RAY_gcs_server_port_wait_time_s": "300",  # a busy machine needs more than Ray's 30 seconds
    # glibc would hand the memory of every training step back to the system, and fault it in again at the next.
    "MALLOC_MMAP_THRESHOLD_": str(256 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
}
"""The environment of a cluster that is started on this machine, unless the user has set it otherwise."""
NODE_PATIENCE = float(os.environ.get("ARDIFF_NODE_PATIENCE", 1200))
"""Seconds to wait for nodes that an autoscaler starts: machines with many GPUs take minutes."""


@contextlib.contextmanager
def ray_cluster(cpus: int = 4) -> Iterator[None]:
    """Joins the cluster that this job runs on, or starts one on this machine for as long as the block lasts.

    On this machine it listens on the loopback interface only, and has at least ``cpus`` logical CPUs, four or more, so
    that reading data never waits for a worker that waits for data. A cluster that is already joined is used and left as
    it is. Several can run at once; their logs lie in /tmp/ray, or in $RAY_TMPDIR/ray.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # so that relative paths mean the same to workers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault(*s3.CHECKSUMS)
    verbose = bool(os.environ.get("ARDIFF_DEBUG"))
    if not verbose:
        _silence()
    runtime_env: dict[str, Any] = {"worker_process_setup_hook": "ardiff.logs.set_up"} if logs.is_json() else {}
    if os.environ.get("RAY_ADDRESS"):
        # Nodes of a cluster do not have this process's environment.
        runtime_env["env_vars"] = {**dict([s3.CHECKSUMS]), **s3.current().environment(), **logs.environment()}
        ray.init(log_to_driver=verbose, logging_level=logging.WARNING, runtime_env=runtime_env)
        if not await_resource("CPU", 1):
            raise ArdiffError("The Ray cluster has no node with CPUs to work on, and none came: see its autoscaler.")
    else:
        for name, value in HERE.items():
            os.environ.setdefault(name, value)
        if not any(os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
            # A token of its own: Ray would keep one in the home folder, which two first runs at once fight over.
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        ray.init(
            address="local",
            num_cpus=max(4, cpus, os.cpu_count() or 1),
            object_store_memory=400 * 2**20,
            include_dashboard=False,
            _node_ip_address="127.0.0.2",
            log_to_driver=verbose,
            logging_level=logging.WARNING,
            runtime_env=runtime_env,
        )
    logs.set_up()  # after Ray has set up its own
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.target_max_block_size = 16 * 2**20
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


def _silence() -> None:
    """Turns off Ray's warnings about what the jobs do on purpose; ``--debug`` keeps them."""
    # Ray 2.60 has no other way to bound retries, or to give each actor options of its own.
    warnings.filterwarnings("ignore", r"`ray_remote_args(_fn)?` is deprecated")
    for name in (
        "ray._private.authentication.authentication_token_setup",  # token authentication is on
        "ray.data._internal.progress",  # progress bars are off
        "ray.data.datasource.file_datasink",  # an incomplete set of latents is written over
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    # These log what is raised as an exception right after.
    for name in ("ray.data.exceptions", "ray.data._internal.execution.streaming_executor_state"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def resolve_device(name: str) -> torch.device:
    """``auto`` is a GPU if the cluster has one now; ``cuda`` waits until a cluster that grows has one.

    Raises ArdiffError if a GPU is asked for and there is none.
    """
    if name == "cpu":
        return torch.device("cpu")
    has_gpu = await_resource("GPU", 1 if name == "cuda" else 0) > 0
    if name == "cuda" and not has_gpu:
        raise ArdiffError("device=cuda, but the Ray cluster has no GPU: give device=cpu or auto.")
    if not has_gpu and os.environ.get("RAY_ADDRESS"):
        print_line("device=auto: the cluster has no GPU now, so CPUs compute. device=cuda waits for nodes with GPUs.")
    return torch.device("cuda" if has_gpu else "cpu")


def await_resource(kind: Literal["CPU", "GPU"], count: int) -> int:
    """How many CPUs or GPUs the cluster has. On one with fewer than ``count``, which may be scaled to nothing, asks for
    them and waits a while for nodes that have them; on this machine nothing will come."""

    def have() -> int:
        return int(ray.cluster_resources().get(kind, 0))  # type: ignore[no-untyped-call]

    if have() >= count or not os.environ.get("RAY_ADDRESS"):
        return have()
    print_line(f"Waiting for nodes with {count} {kind}s; the cluster has {have()}.")
    demand = placement_group([{kind: 1}] * count)  # what cannot be placed is what the autoscaler starts nodes for
    deadline = time.monotonic() + NODE_PATIENCE
    try:
        while have() < count and time.monotonic() < deadline:
            time.sleep(1)
    finally:
        remove_placement_group(demand)
    return have()
