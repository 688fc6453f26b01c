"""Loads the endpoint: time to the first frame, throughput by number of clients, scaling, as tables.

    python benchmarks/serve.py                      # the tables of docs/performance.md, about ten minutes on two cores
    python benchmarks/serve.py --part latency       # one of them: latency, packing, scaling
    python benchmarks/serve.py --url http://...     # latency and clients' throughput of a service that runs already

Without --url it saves a model with random weights, which do not change what is computed, and starts `ardiff serve` for
each setting. Packing is compared in alternating pairs, a service that takes 16 jobs together against one that takes one
(`service.engine.max_requests=1`), and the median of the pairs' ratios is printed; on a machine that does other work
too, the replica's processor time says more than the clock.
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

from ardiff.client import Client
from ardiff.data.latents import LatentStatistics
from ardiff.diffusion.config import DiffusionConfig
from ardiff.dit import DiT, DiTConfig
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.vae import ARAutoencoder, AutoencoderConfig

STARTED: dict[str, psutil.Process] = {}  # by address
PARTS = ["latency", "packing", "scaling"]
STEPS = 20


def save_pipeline(folder: Path, options: argparse.Namespace) -> None:
    """A pipeline of the given size with random weights."""
    sizes = {"num_tokens": options.tokens, "width": options.width, "num_heads": 4}
    vae = ARAutoencoder(AutoencoderConfig(resolution=32, patch_size=8, depth=3, temporal_window=16, **sizes))
    dit = DiT(DiTConfig(num_frames=16, depth=options.depth, num_classes=4, attention_window=16, **sizes))
    generator = torch.Generator().manual_seed(0)
    for parameter in [*vae.parameters(), *dit.parameters()]:
        parameter.data.normal_(std=0.05, generator=generator)
    statistics_ = LatentStatistics([[0.0] * 4] * options.tokens, 1.0)
    ARDiffusionPipeline(vae, dit, DiffusionConfig(), statistics_, ["a", "b", "c", "d"]).save_pretrained(str(folder))


@contextlib.contextmanager
def serving(pipeline: Path, threads: int, *settings: str) -> Iterator[str]:
    """`ardiff serve` on a free port, with its files in a folder of its own; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="sb-", dir="/tmp") as folder:
        command = [sys.executable, "-m", "ray_jobs.serve", "--checkpoint", str(pipeline), "--port", str(port)]
        given = [f"--cpu-threads={threads}", f"service.storage={folder}/shared", "service.max_waiting=256"]
        given += ["service.poll_seconds=0.1", "service.requests_per_minute=100000", "service.jobs_per_key=1000"]
        process = subprocess.Popen(
            [*command, *given, *settings], env={**os.environ, "RAY_TMPDIR": folder}, stderr=subprocess.DEVNULL
        )
        url = f"http://127.0.0.1:{port}"
        STARTED[url] = psutil.Process(process.pid)
        try:
            while not _ready(url):
                if process.poll() is not None:
                    raise RuntimeError("the service does not start")
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
    """Seconds to the first frame's bytes and to the end of a stream."""
    started, first = time.perf_counter(), 0.0
    with httpx.stream("POST", f"{url}/v1/videos:stream", json=fields, timeout=600) as answer:
        if answer.is_error:
            raise RuntimeError(f"{answer.status_code}: {answer.read().decode()}")
        for _ in answer.iter_raw():
            first = first or time.perf_counter() - started
    return first, time.perf_counter() - started


def watch(url: str, **fields: Any) -> None:
    """Asks for a video, which may wait for its turn, and reads it while it is generated."""
    asked = httpx.post(f"{url}/v1/videos", json=fields, timeout=600).raise_for_status().json()
    httpx.get(f"{url}/v1/videos/{asked['id']}/stream", timeout=600).raise_for_status()


def load(url: str, clients: int, videos: int, **fields: Any) -> float:
    """Seconds that ``clients`` clients need for ``videos`` videos, each asking for the next when it has one."""
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
    print("\n| F | ar_step | first frame s | whole video s | share |\n|---|---|---|---|---|")
    for ar_step in (2, 5, 10, STEPS):
        rounds = [
            stream(url, num_frames=128, ar_step=ar_step, num_inference_steps=STEPS, class_label=0, seed=seed)
            for seed in range(repeats)
        ]
        first, whole = (statistics.median(times) for times in zip(*rounds, strict=True))
        share = statistics.median(a / b for a, b in rounds)
        print(f"| 128 | {ar_step} | {first:.2f} | {whole:.2f} | **{share:.3f}** |", flush=True)


def print_packing(packed: str, single: str, repeats: int, frames: int, numbers: list[int]) -> None:
    print("\n| clients | videos/s packed | one at a time | ratio | CPU ms/frame packed | one at a time | ratio |")
    print("|---|---|---|---|---|---|---|")
    fields = {"num_frames": frames, "ar_step": 5, "num_inference_steps": STEPS, "class_label": 0}
    for clients in numbers:
        videos = max(clients * 2, 8)
        rates, costs = [], []
        for _ in range(repeats):
            pair = []
            for url in (packed, single):
                before = _replica_seconds(url)
                seconds = load(url, clients, videos, **fields)
                pair.append((videos / seconds, 1000 * (_replica_seconds(url) - before) / videos / frames))
            rates.append([rate for rate, _ in pair])
            costs.append([cost for _, cost in pair])
        faster = statistics.median(a / b for a, b in rates)
        cheaper = statistics.median(b / a for a, b in costs)
        together, alone = (statistics.median(rate) for rate in zip(*rates, strict=True))
        little, much = (statistics.median(cost) for cost in zip(*costs, strict=True))
        print(
            f"| {clients} | {together:.2f} | {alone:.2f} | **{faster:.2f}** | {little:.1f} | {much:.1f} "
            f"| **{cheaper:.2f}** |",
            flush=True,
        )


def print_clients(url: str, frames: int) -> None:
    print("\n| clients | videos/s | frames/s |\n|---|---|---|")
    for clients in (1, 4, 16):
        rate = clients * 2 / load(url, clients, clients * 2, num_frames=frames, num_inference_steps=STEPS)
        print(f"| {clients} | {rate:.2f} | {rate * frames:.1f} |", flush=True)


def print_scaling(url: str, jobs: int) -> None:
    """Follows the number of replicas while ``jobs`` jobs are asked for at once, and after."""
    client, started = Client(url), time.monotonic()
    waiting = {
        client.create(num_frames=128, ar_step=5, num_inference_steps=STEPS, seed=seed)["id"] for seed in range(jobs)
    }
    print("\n| after s | replicas | unfinished jobs |\n|---|---|---|")
    seen, calm = 0, 0.0
    while True:
        waiting = {i for i in waiting if client.get(i)["status"] in ("queued", "in_progress")}
        count = len(_replicas(url))
        if count != seen:
            print(f"| {time.monotonic() - started:.0f} | {count} | {len(waiting)} |", flush=True)
            seen = count
        if not waiting and seen <= 1:
            calm += 1
            if calm > 3:
                return
        time.sleep(0.5)


def _replicas(url: str) -> list[psutil.Process]:
    """Processes of the replicas of a service that this program has started."""
    found = []
    for process in STARTED[url].children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ServeReplica" in " ".join(process.cmdline()):
                found.append(process)
    return found


def _replica_seconds(url: str) -> float:
    """Processor seconds that the replicas have used."""
    return sum(sum(process.cpu_times()[:2]) for process in _replicas(url))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a service that runs already")
    parser.add_argument("--part", choices=PARTS, help="this table only; default: all")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4, help="latent tokens per frame")
    parser.add_argument("--frames", type=int, default=16, help="frames of a video where throughput is measured")
    parser.add_argument("--threads", type=int, default=1, help="of a replica")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="at once, where packing is measured")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.url:
        print_latency(options.url, options.repeats)
        print_clients(options.url, options.frames)
        return
    print(f"width {options.width}, depth {options.depth}, {options.tokens} tokens a frame, 32 x 32 pixels, S={STEPS},")
    print(f"{options.threads} thread(s) a replica, torch {torch.__version__}; median of {options.repeats}")
    with tempfile.TemporaryDirectory() as folder:
        pipeline = Path(folder) / "pipeline"
        save_pipeline(pipeline, options)
        for part in [options.part] if options.part else PARTS:
            match part:
                case "latency":
                    with serving(pipeline, options.threads) as url:
                        stream(url, num_frames=4, num_inference_steps=4)  # warm-up
                        print_latency(url, options.repeats)
                case "packing":
                    with (
                        serving(pipeline, options.threads) as packed,
                        serving(pipeline, options.threads, "service.engine.max_requests=1") as single,
                    ):
                        for url in (packed, single):
                            stream(url, num_frames=4, num_inference_steps=4)
                        print_packing(packed, single, options.repeats, options.frames, options.clients)
                case "scaling":
                    scaling = [
                        "--max-replicas=3",
                        "--jobs-per-replica=4",
                        "--upscale-delay-s=2",
                        "--downscale-delay-s=10",
                    ]
                    with serving(pipeline, 1, *scaling, "service.engine.max_requests=4") as url:
                        print_scaling(url, jobs=16)


if __name__ == "__main__":
    main()
