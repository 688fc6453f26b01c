"""What every job shares: the connection to Ray, progress on the terminal, and the record of a finished stage."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import secrets
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil
import ray
import ray.data
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from ardiff import logs
from ardiff.config import to_yaml
from ardiff.data import s3, storage
from ardiff.errors import ArdiffError
from ray_jobs.monitor import Monitor

STAGE = "stage.json"
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
COMMIT = "ARDIFF_COMMIT"
"""Variable that names the git commit of code that was sent to a cluster without its history."""
MAX_DEATHS = 2
"""Processes that may die of an input, as of a fault in FFmpeg or for lack of memory, before it is not tried again."""
TASK_RETRIES = 50
"""How often a task of Ray Data is begun again when its process has died. Ray's own default is for ever."""
console = Console(stderr=True, highlight=False, soft_wrap=True)
logger = logging.getLogger(__name__)


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
    runtime_env: dict[str, Any] = {"worker_process_setup_hook": "ardiff.logs.set_up"} if logs.structured() else {}
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


@contextlib.contextmanager
def progress_bar(description: str, total: int, unit: str) -> Iterator[ProgressBar]:
    """A bar with rate and remaining time; a line every ten seconds where there is no terminal."""
    bar = ProgressBar(description, total, unit)
    with bar.display:
        yield bar


class ProgressBar:
    """Shows how far a stage is. ``update`` takes absolute counts, so it can be fed from anywhere, in any order."""

    def __init__(self, description: str, total: int, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.started: tuple[float, int] | None = None
        self.printed, self.finished = time.monotonic(), False
        columns = (
            TextColumn("{task.description:<14}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.drawn = console.is_terminal and not logs.structured()
        self.display = Progress(*columns, console=console, disable=not self.drawn)
        self.task = self.display.add_task(description, total=total, rate="", note="")

    def update(self, completed: int, note: str = "") -> None:
        """Shows that ``completed`` of the total are done, and a short note such as the current loss."""
        now = time.monotonic()
        if self.started is None:
            self.started = (now, completed)
        elapsed, done = now - self.started[0], completed - self.started[1]
        rate = f"{done / elapsed:.1f} {self.unit}/s" if elapsed > 0 and done else ""
        note = note or ("starting" if not done and completed < self.total else "")
        self.display.update(self.task, completed=completed, rate=rate, note=note)
        finished = completed == self.total
        due = not self.finished if finished else now - self.printed > 10
        if due and not self.drawn:
            self.printed, self.finished = now, finished
            left = (
                f", {(self.total - completed) * elapsed / done:.0f} s left" if done and completed < self.total else ""
            )
            line = f"{self.description}: {completed}/{self.total} {self.unit}s {rate}{left} {note}".rstrip()
            say(line, completed=completed, total=self.total, unit=self.unit)


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Places an actor on the driver's node: elsewhere it would be lost with a node that the job can do without."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


@contextlib.contextmanager
def remote_progress(
    description: str, total: int, unit: str, kind: type[Monitor] = Monitor, *arguments: Any
) -> Iterator[Any]:
    """A progress bar that is fed from the cluster.

    Yields the handle of an actor with ``set(completed, note)``, ``add(count)``, ``say(line)`` and ``fail(error)``; of
    another ``kind`` if one is given, made with ``arguments``. A failure that was told to it is raised here when the
    block ends.
    """
    monitor: Any = ray.remote(kind).options(num_cpus=0, scheduling_strategy=on_this_node()).remote(*arguments)
    stop = threading.Event()

    def follow(bar: ProgressBar) -> None:
        asked, last = None, False
        while not last:
            last = stop.wait(0.5) and asked is None
            asked = asked or monitor.read.remote()
            try:
                completed, note, lines = ray.get(asked, timeout=10)
            except ray.exceptions.GetTimeoutError:  # a machine under heavy load: the same answer, later
                last = False
                continue
            except ray.exceptions.RayError:
                return
            asked = None
            for line in lines:
                say(escape(line))  # it may quote an error with brackets
            bar.update(completed, note)

    interruption: Exception | None = None
    with progress_bar(description, total, unit) as bar:
        follower = threading.Thread(target=follow, args=(bar,), daemon=True)
        follower.start()
        try:
            yield monitor
        except Exception as error:
            interruption = error
        finally:
            stop.set()
            follower.join()
    failure: ArdiffError | None = ray.get(monitor.failure.remote())
    if failure is not None:
        raise failure from interruption
    if interruption is not None:
        raise interruption


@contextlib.contextmanager
def telling(monitor: Any) -> Iterator[None]:
    """Tells a :func:`remote_progress` of an ArdiffError, which would lose its type on its way through Ray Data."""
    try:
        yield
    except ArdiffError as error:
        ray.get(monitor.fail.remote(error))
        raise


@contextlib.contextmanager
def attempting(monitor: Any, what: str) -> Iterator[int]:
    """Around the work on an input that may end this process: yields how many processes it has ended already.

    From ``MAX_DEATHS`` on it must not be tried again. Ray tries a task again as a whole, so its other inputs are safe.
    """
    deaths = min(ray.get(monitor.attempt.remote(what)), MAX_DEATHS)
    yield deaths
    if deaths < MAX_DEATHS:
        monitor.survived.remote(what)


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
        say("device=auto: the cluster has no GPU now, so CPUs compute. device=cuda waits for nodes with GPUs.")
    return torch.device("cuda" if has_gpu else "cpu")


def await_resource(kind: Literal["CPU", "GPU"], count: int) -> int:
    """How many CPUs or GPUs the cluster has. On one with fewer than ``count``, which may be scaled to nothing, asks for
    them and waits a while for nodes that have them; on this machine nothing will come."""

    def have() -> int:
        return int(ray.cluster_resources().get(kind, 0))  # type: ignore[no-untyped-call]

    if have() >= count or not os.environ.get("RAY_ADDRESS"):
        return have()
    say(f"Waiting for nodes with {count} {kind}s; the cluster has {have()}.")
    demand = placement_group([{kind: 1}] * count)  # what cannot be placed is what the autoscaler starts nodes for
    deadline = time.monotonic() + NODE_PATIENCE
    try:
        while have() < count and time.monotonic() < deadline:
            time.sleep(1)
    finally:
        remove_placement_group(demand)
    return have()


@dataclass(frozen=True, slots=True)
class StageRecord:
    """What is known of a finished stage; its presence in the stage's folder means that the stage is complete."""

    name: str
    fingerprint: str
    """Names the configuration and the inputs of the stage."""
    seconds: float
    """Wall time, summed over interrupted attempts."""
    peak_mib: float
    """Largest memory of all processes of the job on the driver's machine, in MiB."""
    note: str
    """Counts and figures worth knowing."""
    results: dict[str, Any]
    """What later stages read."""


def read_stage(folder: str) -> StageRecord | None:
    """The record in ``folder``, or None if the stage is not complete."""
    place = storage.join(folder, STAGE)
    return StageRecord(**json.loads(storage.read_bytes(place))) if storage.exists(place) else None


class StageRun:
    """Collects the figures of a running stage."""

    def __init__(self) -> None:
        self.note = ""
        self.results: dict[str, Any] = {}


@contextlib.contextmanager
def stage(name: str, folder: str, key: str) -> Iterator[StageRun]:
    """Runs a stage: measures time and memory, and writes its record when it ends well."""
    attempts = storage.join(folder, "interrupted.json")
    before = float(json.loads(storage.read_bytes(attempts))) if storage.exists(attempts) else 0.0
    run, started = StageRun(), time.monotonic()
    with _MemoryWatch() as memory:
        try:
            yield run
        except ArdiffError:
            raise  # refused or failed, not interrupted
        except BaseException:
            with contextlib.suppress(Exception):  # the reason for the interruption matters more than its record
                storage.write_bytes(attempts, json.dumps(before + time.monotonic() - started).encode())
            raise
    seconds = before + time.monotonic() - started
    record = StageRecord(name, key, round(seconds, 2), round(memory.peak / 2**20, 1), run.note, run.results)
    storage.write_bytes(storage.join(folder, STAGE), json.dumps(asdict(record), indent=1).encode())
    storage.delete_file(attempts)  # they count once
    line = f"[green]✓[/] {name}: {seconds:.1f} s, {record.peak_mib:.0f} MiB. {run.note}"
    say(line, stage=name, seconds=record.seconds, peak_mib=record.peak_mib)


class _MemoryWatch:
    """Samples the memory of this process and all it started, shared pages counted once (PSS)."""

    def __enter__(self) -> _MemoryWatch:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, _tree_memory())
            if self._stop.wait(5.0):
                return


def _tree_memory() -> int:
    total = 0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            full = process.memory_full_info()
            total += getattr(full, "pss", full.rss)
    return total


def record_run(folder: str, config: Any) -> None:
    """Writes what a run is made of to its folder before it starts: resolved configuration, versions, git commit."""
    storage.write_bytes(storage.join(folder, "config.yaml"), to_yaml(config).encode())
    if (reach := s3.current()) != s3.StorageConfig():
        storage.write_bytes(storage.join(folder, "storage.yaml"), to_yaml(reach).encode())
    storage.write_bytes(storage.join(folder, "versions.json"), json.dumps(versions(), indent=1).encode())


def versions() -> dict[str, str]:
    """Versions of everything that shapes a result."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("ardiff", "torch", "ray", "numpy", "av", "pyarrow", "einops", "safetensors"):
        found[package] = metadata.version(package)
    if COMMIT in os.environ:
        return {**found, "git": os.environ[COMMIT]}
    here = Path(__file__).resolve().parent
    git = None
    with contextlib.suppress(FileNotFoundError):  # not every machine has git
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
        )
    return {**found, "git": git.stdout.strip() if git and git.stdout.strip() else "unknown"}


def say(message: str, **fields: Any) -> None:
    """One line to the user, on standard error; where lines are JSON, with ``fields`` for programs."""
    if logs.structured():
        logger.info("%s", Text.from_markup(message).plain, extra={"fields": fields})
    else:
        console.print(message)
