"""The table of ``benchmarks/serve.py --part store``: the endpoint's jobs on SQLite and on PostgreSQL.

Replicas with a small model run in this process. Storage is a local folder whose requests are counted and take as long
as those of S3: 30 ms to write, 20 ms to read or delete. PostgreSQL is the server of ``make postgresql``.
"""

import asyncio
import contextlib
import functools
import itertools
import socket
import statistics
import sys
import tempfile
import threading
import time
import timeit
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from sqlalchemy import event, insert
from sqlalchemy.engine import Engine

from ardiff.data import storage
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.serving.api import build_app
from ardiff.serving.config import ServiceConfig
from ardiff.serving.database import jobs
from ardiff.serving.metrics import PrometheusRecorder
from ardiff.serving.records import JobRecord, new_id
from ardiff.serving.replica import Replica
from ardiff.serving.schemas import VideoRequest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from postgres_server import PostgresServer, programs

DELAYS = {"write_bytes": 0.03, "read_bytes": 0.02, "read_range": 0.02, "find_file": 0.02, "delete_file": 0.02}
"""Seconds of the functions of storage that are one request of S3 each."""
IDLE_SECONDS, POST_SECONDS = 10.0, 5.0
SHORT_JOBS, STORED_JOBS, EXPIRED_JOBS = 40, 10_000, 1000
Row = tuple[str, str, Callable[["Bench"], str]]


def has_postgresql() -> bool:
    """Whether the server of ``make postgresql`` is installed."""
    return programs() is not None


class Accepting(Replica):
    """A replica that accepts requests and runs none."""

    async def start(self) -> None:
        await self.queue.prepare()


class Bench:
    """Replicas with one database and one folder. ``counts`` has all statements and requests of storage so far."""

    def __init__(self, pipeline: ARDiffusionPipeline, folder: str, settings: dict[str, str], counts: Counter[str]):
        self.pipeline, self.counts = pipeline, counts
        self.settings: dict[str, Any] = {"storage": folder, "max_waiting": 10**6, "jobs_per_key": 10**6, **settings}

    def replica(self, kind: type[Replica] = Replica) -> Replica:
        """A replica that is not started."""
        config = ServiceConfig(**self.settings, requests_per_minute=10**6)
        return kind({"tiny": self.pipeline}, config, PrometheusRecorder(), "bench")

    def run(self, count: int, work: Callable[[list[Replica]], Awaitable[Any]]) -> Any:
        """What ``work`` returns for so many running replicas."""

        async def main() -> Any:
            replicas = [self.replica() for _ in range(count)]
            await asyncio.gather(*(replica.start() for replica in replicas))
            result = await work(replicas)
            await asyncio.gather(*(replica.stop() for replica in replicas))
            return result

        return asyncio.run(main())

    def fill(self, count: int, **columns: Any) -> None:
        """Stores so many jobs of another model, which no replica runs."""
        store = self.replica().stores.jobs.store
        values = {"owner": "anonymous", "kind": "job", "model": "other", "lease": 1, "heartbeat": 0, "crashes": 0}
        values |= {"cancelled": False, "has_files": False, **columns}
        record = '{"params": {"num_frames": 2}, "fps": 8, "size": "32x32", "iterations": 2, "created_at": 0}'
        with store.database.transaction() as connection:
            rows = [{**values, "id": new_id(), "record": record} for _ in range(count)]
            connection.execute(insert(jobs), rows)

    @contextlib.contextmanager
    def client(self) -> Iterator[httpx.Client]:
        """A client of a replica that runs nothing, over HTTP."""
        listener = socket.socket(proto=socket.IPPROTO_TCP)  # with 0, asyncio does not set TCP_NODELAY
        listener.bind(("127.0.0.1", 0))
        app = build_app(self.replica(Accepting), PrometheusRecorder())
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


def idle(bench: Bench, count: int) -> str:
    """Statements and requests of storage, per second and idle replica."""

    async def work(replicas: list[Replica]) -> Counter[str]:
        await asyncio.sleep(2.0)
        before = bench.counts.copy()
        await asyncio.sleep(IDLE_SECONDS)
        return bench.counts - before

    counts = bench.run(count, work)
    return " / ".join(f"{counts[name] / IDLE_SECONDS / count:.1f}" for name in ("statements", "requests"))


def short_jobs(bench: Bench, count: int) -> str:
    """Seconds for the short jobs on so many replicas; statements and requests of storage for the life of a job."""

    async def work(replicas: list[Replica]) -> str:
        videos, store, before = replicas[0].videos, replicas[0].stores.jobs, bench.counts.copy()
        started, request = time.perf_counter(), VideoRequest.model_validate({"num_frames": 2, "num_inference_steps": 2})
        chosen = itertools.islice(itertools.cycle(replicas), SHORT_JOBS)
        records = [await replica.admission.queue_job("alice", request, None) for replica in chosen]
        while (await store.call(store.store.load, "alice")).owned:
            bench.counts["statements"] -= 1  # not of the replicas
            await asyncio.sleep(0.1)
        seconds = time.perf_counter() - started
        for record in records:
            _, video = await videos.content("alice", record.id)
            await asyncio.to_thread(video.read)
            await videos.delete("alice", record.id)
        counts = bench.counts - before
        return f"{seconds:.1f} s; {counts['statements'] / SHORT_JOBS:.0f} / {counts['requests'] / SHORT_JOBS:.1f}"

    shown: str = bench.run(count, work)
    return shown


def timed(client: httpx.Client, call: Callable[[], httpx.Response], repeats: int = 40) -> str:
    """The median time of a call, and its median ratio to one that needs no database, in alternating pairs."""
    pairs = []
    for _ in range(repeats):
        times = []
        for action in (call, lambda: client.get("/v1/models")):
            started = time.perf_counter()
            action().raise_for_status()
            times.append(time.perf_counter() - started)
        pairs.append(times)
    ratio = statistics.median(first / second for first, second in pairs)
    return f"{1000 * statistics.median(first for first, _ in pairs):.0f} ms (**{ratio:.1f}**)"


def post(client: httpx.Client) -> httpx.Response:
    return client.post("/v1/videos", json={"num_frames": 2, "num_inference_steps": 2})


def posts(bench: Bench) -> str:
    """The time of a POST, and POSTs per second of eight clients."""
    with bench.client() as client:
        median, deadline = timed(client, lambda: post(client)), time.monotonic() + POST_SECONDS

        def work() -> int:
            count = 0
            while time.monotonic() < deadline:
                post(client).raise_for_status()
                count += 1
            return count

        with ThreadPoolExecutor(8) as threads:
            total = sum(future.result() for future in [threads.submit(work) for _ in range(8)])
    return f"{median}; {total / POST_SECONDS:.0f}/s"


def posts_with_open_jobs(bench: Bench) -> str:
    bench.fill(STORED_JOBS, status="queued")
    return posts(bench)


def lists(bench: Bench) -> str:
    """The times of the first page of the list, and of the state of a video."""
    now = time.time()
    bench.fill(STORED_JOBS, status="completed", ended_at=now, expires_at=now + 10**6)
    with bench.client() as client:
        newest = client.get("/v1/videos").json()["first_id"]
        page = timed(client, lambda: client.get("/v1/videos"))
        return f"{page}; {timed(client, lambda: client.get(f'/v1/videos/{newest}'))}"


def statements(bench: Bench) -> str:
    """Median times of what a POST and a list ask of the database, without HTTP."""
    store = bench.replica().stores.jobs.store
    kind: dict[str, Any] = {"kind": "job", "model": "other", "params": {"num_frames": 2}, "fps": 8.0, "size": "32x32"}

    def create() -> None:
        record = JobRecord(id=new_id(), owner="bob", iterations=2, created_at=time.time(), **kind)
        store.create(record, lambda load: None)

    calls = (create, lambda: store.page("anonymous", 21))
    medians = []
    for call in calls:
        times = [timeit.timeit(call, number=1) for _ in range(50)]
        medians.append(f"{1000 * statistics.median(times):.0f} ms")
    return "; ".join(medians)


def expire(bench: Bench) -> str:
    """Seconds to remove expired jobs with their files."""
    bench.fill(
        EXPIRED_JOBS, status="completed", ended_at=time.time() - 200, expires_at=time.time() - 100, has_files=True
    )

    async def work(replicas: list[Replica]) -> float:
        started, store = time.perf_counter(), replicas[0].stores.jobs
        while await store.call(store.store.expired_files, 1):
            await asyncio.sleep(0.05)
        return time.perf_counter() - started

    return f"{bench.run(1, work):.1f} s"


IDLE = "idle: statements / requests of storage per second and replica; replicas: {}"
SHORT = f"{SHORT_JOBS} short jobs; statements / requests of storage for the life of a job; replicas: {{}}"
ROWS: tuple[Row, ...] = (
    *((IDLE.format(n), "constant", functools.partial(idle, count=n)) for n in (1, 8, 32)),
    *((SHORT.format(n), "at most 8 requests", functools.partial(short_jobs, count=n)) for n in (1, 4, 16)),
    ("`POST /v1/videos`, empty queue; POSTs per second", "", posts),
    (f"the same with {STORED_JOBS} open jobs", "50 ms", posts_with_open_jobs),
    (f"`GET /v1/videos` with {STORED_JOBS} more finished jobs; `GET /v1/videos/ID`", "20 ms", lists),
    ("their statements: of a POST; of a page of the list", "", statements),
    (f"{EXPIRED_JOBS} expired videos removed", "5 s", expire),
)


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts statements, and requests of storage, which it delays."""
    counts, original = Counter[str](), {name: getattr(storage, name) for name in DELAYS}

    def statement(*arguments: Any) -> None:
        counts["statements"] += 1

    def request(name: str, *arguments: Any) -> Any:
        counts["requests"] += 1
        time.sleep(DELAYS[name])
        return original[name](*arguments)

    event.listen(Engine, "before_cursor_execute", statement)
    for name in DELAYS:
        setattr(storage, name, functools.partial(request, name))
    try:
        yield counts
    finally:
        event.remove(Engine, "before_cursor_execute", statement)
        for name, function in original.items():
            setattr(storage, name, function)


def print_store(pipeline: ARDiffusionPipeline) -> None:
    """Prints the table."""
    print("\n| | SQLite | PostgreSQL | goal |\n|---|---|---|---|")
    with (
        tempfile.TemporaryDirectory() as folder,
        PostgresServer(max_connections=200) as server,
        counted() as counts,
    ):
        kinds = {"sqlite": {}, "postgresql": server.new_database()}
        benches = [Bench(pipeline, f"{folder}/{name}", settings, counts) for name, settings in kinds.items()]
        for bench in benches:
            bench.run(1, lambda replicas: asyncio.sleep(0))  # creates the tables
        for name, goal, measure in ROWS:
            print(f"| {name} | {' | '.join(measure(bench) for bench in benches)} | {goal} |", flush=True)
