"""Measures the endpoint: time to the first frame, throughput by number of clients, scaling. Prints tables.

    python benchmarks/serve.py                      # the tables of docs/performance.md, about ten minutes on two cores
    python benchmarks/serve.py --part latency       # one of them: latency, packing, scaling, store, continue
    make postgresql                                 # once, before the table of the store
    python benchmarks/serve.py --url http://...     # latency and throughput of a running service

Without --url it saves a model with random weights, which cost as much as trained ones, and starts `ardiff serve` for
each setting. Batching is measured in alternating pairs: a service that runs 16 jobs together against one that runs one
at a time (`service.engine.max_requests=1`). The table has the median of the pairs' ratios. On a busy machine the CPU
time of the replica is more reliable than the wall time.
"""

import argparse
import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from serve_continue import print_continuation
from serve_store import has_postgresql, print_store

from ardiff.client import Client
from ardiff.data.latents import LatentStatistics
from ardiff.diffusion.config import DiffusionConfig
from ardiff.dit import DiT, DiTConfig
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.resolution import Resolution
from ardiff.vae import ARAutoencoder, AutoencoderConfig

STARTED: dict[str, psutil.Process] = {}
"""Processes of `ardiff serve` by URL."""
PARTS = ["latency", "packing", "scaling", "store", "continue"]
STEPS = 20


def save_pipeline(folder: Path, options: argparse.Namespace) -> None:
    """A pipeline of the given size with random weights."""
    sizes = {"num_tokens": options.tokens, "width": options.width, "num_heads": 4}
    vae = ARAutoencoder(
        AutoencoderConfig(resolution=Resolution(32, 32), patch_size=8, depth=3, temporal_window=16, **sizes)
    )
    dit = DiT(DiTConfig(num_frames=16, depth=options.depth, num_classes=4, attention_window=16, **sizes))
    generator = torch.Generator().manual_seed(0)
    for parameter in [*vae.parameters(), *dit.parameters()]:
        parameter.data.normal_(std=0.05, generator=generator)
    statistics_ = LatentStatistics([[0.0] * 4] * options.tokens, 1.0)
    ARDiffusionPipeline(vae, dit, DiffusionConfig(), statistics_, ["a", "b", "c", "d"]).save_pretrained(str(folder))


@contextlib.contextmanager
def serving(pipeline: Path, threads: int, *settings: str) -> Iterator[str]:
    """Runs `ardiff serve` on a free port, with its files in a temporary folder. Yields its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="sb-", dir="/tmp") as folder:
        command = [sys.executable, "-m", "ray_jobs.serve", "--checkpoint", str(pipeline), "--port", str(port)]
        arguments = [f"--cpu-threads={threads}", f"service.storage={folder}/shared", "service.max_waiting=256"]
        arguments += ["service.poll_seconds=0.1", "service.requests_per_minute=100000", "service.jobs_per_key=1000"]
        process = subprocess.Popen(
            [*command, *arguments, *settings], env={**os.environ, "RAY_TMPDIR": folder}, stderr=subprocess.DEVNULL
        )
        url = f"http://127.0.0.1:{port}"
        STARTED[url] = psutil.Process(process.pid)
        try:
            while not _ready(url):
                if process.poll() is not None:
                    raise RuntimeError("the service did not start")
                time.sleep(0.3)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=180)


def _ready(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/healthz", timeout=5).status_code == 200
    return False


def stream(url: str, **fields: Any) -> tuple[float, float]:
    """Seconds until the first bytes and until the end of a stream."""
    started, first = time.perf_counter(), 0.0
    with httpx.stream("POST", f"{url}/v1/videos:stream", json=fields, timeout=600) as response:
        if response.is_error:
            raise RuntimeError(f"{response.status_code}: {response.read().decode()}")
        for _ in response.iter_raw():
            first = first or time.perf_counter() - started
    return first, time.perf_counter() - started


def watch(url: str, **fields: Any) -> None:
    """Requests a video, which may wait in the queue, and reads it while it is generated."""
    video = httpx.post(f"{url}/v1/videos", json=fields, timeout=600).raise_for_status().json()
    httpx.get(f"{url}/v1/videos/{video['id']}/stream", timeout=600).raise_for_status()


def load(url: str, clients: int, videos: int, **fields: Any) -> float:
    """Seconds that ``clients`` clients need for ``videos`` videos. Each requests one video after the other."""
    numbers = iter(range(videos))
    lock = threading.Lock()
    failures: list[Exception] = []

    def work() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            try:
                watch(url, seed=number, **fields)
            except (httpx.HTTPError, RuntimeError) as error:
                failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return time.perf_counter() - started


def print_latency(url: str, repeats: int) -> None:
    print("\n| F | ar_step | first frame s | complete video s | share |\n|---|---|---|---|---|")
    for ar_step in (2, 5, 10, STEPS):
        rounds = [
            stream(url, num_frames=128, ar_step=ar_step, num_inference_steps=STEPS, class_label=0, seed=seed)
            for seed in range(repeats)
        ]
        first, complete = (statistics.median(times) for times in zip(*rounds, strict=True))
        share = statistics.median(a / b for a, b in rounds)
        print(f"| 128 | {ar_step} | {first:.2f} | {complete:.2f} | **{share:.3f}** |", flush=True)


def print_batching(batched: str, single: str, repeats: int, frames: int, numbers: list[int]) -> None:
    print("\n| clients | videos/s batched | one at a time | ratio | CPU ms/frame batched | one at a time | ratio |")
    print("|---|---|---|---|---|---|---|")
    fields = {"num_frames": frames, "ar_step": 5, "num_inference_steps": STEPS, "class_label": 0}
    for clients in numbers:
        videos = max(clients * 2, 8)
        rates, costs = [], []
        for _ in range(repeats):
            pair = []
            for url in (batched, single):
                before = _cpu_seconds(url)
                seconds = load(url, clients, videos, **fields)
                pair.append((videos / seconds, 1000 * (_cpu_seconds(url) - before) / videos / frames))
            rates.append([rate for rate, _ in pair])
            costs.append([cost for _, cost in pair])
        faster = statistics.median(a / b for a, b in rates)
        cheaper = statistics.median(b / a for a, b in costs)
        batched_rate, single_rate = (statistics.median(rate) for rate in zip(*rates, strict=True))
        batched_cost, single_cost = (statistics.median(cost) for cost in zip(*costs, strict=True))
        print(
            f"| {clients} | {batched_rate:.2f} | {single_rate:.2f} | **{faster:.2f}** "
            f"| {batched_cost:.1f} | {single_cost:.1f} "
            f"| **{cheaper:.2f}** |",
            flush=True,
        )


def print_clients(url: str, frames: int) -> None:
    print("\n| clients | videos/s | frames/s |\n|---|---|---|")
    for clients in (1, 4, 16):
        rate = clients * 2 / load(url, clients, clients * 2, num_frames=frames, num_inference_steps=STEPS)
        print(f"| {clients} | {rate:.2f} | {rate * frames:.1f} |", flush=True)


def print_scaling(url: str, jobs: int) -> None:
    """Prints the number of replicas while ``jobs`` jobs run, and until it is 1 again."""
    client, started = Client(url), time.monotonic()
    waiting = {
        client.create(num_frames=128, ar_step=5, num_inference_steps=STEPS, seed=seed)["id"] for seed in range(jobs)
    }
    print("\n| after s | replicas | unfinished jobs |\n|---|---|---|")
    last_count, idle_polls = 0, 0
    while True:
        waiting = {i for i in waiting if client.get(i)["status"] in ("queued", "in_progress")}
        count = len(_replicas(url))
        if count != last_count:
            print(f"| {time.monotonic() - started:.0f} | {count} | {len(waiting)} |", flush=True)
            last_count = count
        if not waiting and count <= 1:
            idle_polls += 1
            if idle_polls > 3:
                return
        time.sleep(0.5)


def _replicas(url: str) -> list[psutil.Process]:
    """Processes of the replicas of a service that this program started."""
    replicas = []
    for process in STARTED[url].children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ServeReplica" in " ".join(process.cmdline()):
                replicas.append(process)
    return replicas


def _cpu_seconds(url: str) -> float:
    """CPU seconds of the replicas so far."""
    return sum(sum(process.cpu_times()[:2]) for process in _replicas(url))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running service")
    parser.add_argument("--part", choices=PARTS, help="print only this table; default: all")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4, help="latent tokens per frame")
    parser.add_argument("--frames", type=int, default=16, help="frames of a video for throughput")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a replica")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="numbers of clients for batching")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.url:
        print_latency(options.url, options.repeats)
        print_clients(options.url, options.frames)
        return
    parts = [options.part] if options.part else PARTS
    if "store" in parts and not has_postgresql():
        parser.error("there is no PostgreSQL server for the table of the store: run `make postgresql`")
    print(
        f"width {options.width}, depth {options.depth}, {options.tokens} tokens per frame, 32 x 32 pixels, S={STEPS},"
    )
    print(f"{options.threads} thread(s) per replica, torch {torch.__version__}; median of {options.repeats}")
    with tempfile.TemporaryDirectory() as folder:
        pipeline = Path(folder) / "pipeline"
        save_pipeline(pipeline, options)
        for part in parts:
            match part:
                case "latency":
                    with serving(pipeline, options.threads) as url:
                        stream(url, num_frames=4, num_inference_steps=4)  # warm-up
                        print_latency(url, options.repeats)
                case "packing":
                    with (
                        serving(pipeline, options.threads) as batched,
                        serving(pipeline, options.threads, "service.engine.max_requests=1") as single,
                    ):
                        for url in (batched, single):
                            stream(url, num_frames=4, num_inference_steps=4)
                        print_batching(batched, single, options.repeats, options.frames, options.clients)
                case "scaling":
                    scaling = [
                        "--max-replicas=3",
                        "--jobs-per-replica=4",
                        "--upscale-delay-s=2",
                        "--downscale-delay-s=10",
                    ]
                    with serving(pipeline, 1, *scaling, "service.engine.max_requests=4") as url:
                        print_scaling(url, jobs=16)
                case "store":
                    print_store(ARDiffusionPipeline.from_pretrained(str(pipeline)))
                case "continue":
                    print_continuation(ARDiffusionPipeline.from_pretrained(str(pipeline)))


if __name__ == "__main__":
    main()
