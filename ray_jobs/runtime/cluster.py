"""The Ray cluster: joins a cluster or starts one on this machine, and waits for resources."""

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

LOCAL_ENVIRONMENT = {
    # Without a dashboard, Ray Train's state actor searches for one forever.
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an actor that waits for the preemption of this machine
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # delay until the end of a training run is noticed
    "RAY_gcs_server_port_wait_time_s": "300",  # Ray's default of 30 seconds is too short on a busy machine
    # Otherwise glibc returns the memory of every training step to the system and faults it in again.
    "MALLOC_MMAP_THRESHOLD_": str(256 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
}
"""Environment variables of a cluster on this machine, unless the user has set them."""
NODE_TIMEOUT = float(os.environ.get("ARDIFF_NODE_TIMEOUT", 1200))
"""Seconds to wait for nodes that an autoscaler starts. Machines with many GPUs take minutes."""


@contextlib.contextmanager
def ray_cluster(cpus: int = 4) -> Iterator[None]:
    """Joins the cluster that this job runs on, or starts one on this machine while the block runs.

    A cluster on this machine listens on the loopback interface only. It has at least ``cpus`` and at least four logical
    CPUs, so that tasks that read data get a CPU while a worker waits for data. A cluster that is already joined is left
    unchanged. Several clusters can run at once; their logs are in /tmp/ray, or in $RAY_TMPDIR/ray.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths stay valid in workers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault(*s3.CHECKSUMS)
    verbose = bool(os.environ.get("ARDIFF_DEBUG"))
    if not verbose:
        _silence_ray()
    runtime_env: dict[str, Any] = {"worker_process_setup_hook": "ardiff.logs.set_up"} if logs.is_json() else {}
    if os.environ.get("RAY_ADDRESS"):
        # Nodes of a cluster do not inherit this process's environment.
        runtime_env["env_vars"] = {**dict([s3.CHECKSUMS]), **s3.current().environment(), **logs.environment()}
        ray.init(log_to_driver=verbose, logging_level=logging.WARNING, runtime_env=runtime_env)
        if not await_resource("CPU", 1):
            raise ArdiffError("The Ray cluster has no node with CPUs, and none was started: check its autoscaler.")
    else:
        for name, value in LOCAL_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if not any(os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
            # Ray would create a token in the home folder, where two simultaneous first runs conflict.
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        _start_local_cluster(
            num_cpus=max(4, cpus, os.cpu_count() or 1),
            object_store_memory=400 * 2**20,
            include_dashboard=False,
            _node_ip_address="127.0.0.2",
            log_to_driver=verbose,
            logging_level=logging.WARNING,
            runtime_env=runtime_env,
        )
    logs.set_up()  # Ray has just set up its own logging
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


def _start_local_cluster(**options: Any) -> None:
    """Starts Ray on this machine. Tries three times: Ray's limit of 30 seconds is too short on a busy machine.

    The processes of a failed attempt end with this process. Raises ArdiffError if none succeeds.
    """
    timeout: Exception | None = None
    for _ in range(3):
        try:
            ray.init(address="local", **options)
        except Exception as error:  # Ray raises no narrower type
            if "timed out during startup" not in str(error):
                raise
            timeout = error
        else:
            return
    raise ArdiffError(
        "Ray did not start on this machine in three attempts: it is too busy. Run the command again."
    ) from timeout


def _silence_ray() -> None:
    """Turns off Ray's warnings about intended behaviour; ``--debug`` keeps them."""
    # Ray 2.60 has no other way to limit retries or to set options per actor.
    warnings.filterwarnings("ignore", r"`ray_remote_args(_fn)?` is deprecated")
    for name in (
        "ray._private.authentication.authentication_token_setup",  # token authentication is on
        "ray.data._internal.progress",  # progress bars are off
        "ray.data.datasource.file_datasink",  # incomplete latents are overwritten
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    # These log errors that are also raised as exceptions.
    for name in ("ray.data.exceptions", "ray.data._internal.execution.streaming_executor_state"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def resolve_device(name: str) -> torch.device:
    """``auto`` is a GPU if the cluster has one now. ``cuda`` waits until an autoscaler has started one.

    Raises ArdiffError for ``cuda`` without a GPU.
    """
    if name == "cpu":
        return torch.device("cpu")
    has_gpu = await_resource("GPU", 1 if name == "cuda" else 0) > 0
    if name == "cuda" and not has_gpu:
        raise ArdiffError("device=cuda, but the Ray cluster has no GPU: use device=cpu or auto.")
    if not has_gpu and os.environ.get("RAY_ADDRESS"):
        print_line(
            "device=auto: the cluster has no GPU now, so the job runs on CPUs. device=cuda waits for nodes with GPUs."
        )
    return torch.device("cuda" if has_gpu else "cpu")


def await_resource(kind: Literal["CPU", "GPU"], count: int) -> int:
    """The number of CPUs or GPUs of the cluster.

    If a remote cluster has fewer than ``count``, requests them from the autoscaler and waits up to ``NODE_TIMEOUT``.
    """

    def have() -> int:
        return int(ray.cluster_resources().get(kind, 0))  # type: ignore[no-untyped-call]

    if have() >= count or not os.environ.get("RAY_ADDRESS"):
        return have()
    print_line(f"Waiting for nodes with {count} {kind}s; the cluster has {have()}.")
    demand = placement_group([{kind: 1}] * count)  # the autoscaler starts nodes for it
    deadline = time.monotonic() + NODE_TIMEOUT
    try:
        while have() < count and time.monotonic() < deadline:
            time.sleep(1)
    finally:
        remove_placement_group(demand)
    return have()
