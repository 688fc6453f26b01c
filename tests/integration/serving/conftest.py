"""A replica with a tiny model on a free port of this machine, in a thread of the test."""

import asyncio
import contextlib
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from sqlalchemy import update

from ardiff.config import build
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.serving.api import build_app
from ardiff.serving.config import ServiceConfig
from ardiff.serving.database import jobs, service
from ardiff.serving.metrics import PrometheusRecorder
from ardiff.serving.records import JobRecord
from ardiff.serving.replica import Replica
from ardiff.serving.store import JobStore

QUICK = {
    "poll_seconds": 0.05,
    "heartbeat_seconds": 0.2,
    "lease_seconds": 15.0,  # on a busy machine heartbeats are seconds late
    "segment_seconds": 0.1,
    "drain_seconds": 0.0,
}
JOB = {"num_frames": 24, "num_inference_steps": 20, "ar_step": 4, "seed": 4}
"""A video of 112 iterations. Its first frame is final after 20, the next ones every 4."""
LONG = {"num_frames": 400, "num_inference_steps": 20, "ar_step": 10}
"""A video that does not finish while a test looks at it: 4010 iterations."""
SHORT_LEASE = 1.5
"""Seconds of a lease, for a replica that notices the crash of another."""


def eventually(happened: Callable[[], Any], patience: float = 240.0) -> None:
    """Waits until ``happened()`` is true."""
    deadline = time.monotonic() + patience
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def age_jobs(store: JobStore, seconds: float) -> None:
    """Has all jobs, and the last sweep, end so many seconds earlier."""
    with store.database.transaction() as connection:
        times = {column: column - seconds for column in (jobs.c.ended_at, jobs.c.expires_at)}
        connection.execute(update(jobs).values(times))
        connection.execute(update(service).values(swept_at=0.0))


@dataclass
class Served:
    """A running replica."""

    replica: Replica
    url: str
    client: httpx.Client
    loop: asyncio.AbstractEventLoop
    server: uvicorn.Server
    thread: threading.Thread
    pipeline: ARDiffusionPipeline = field(repr=False)
    lets: list[Callable[[float], None]] = field(default_factory=list, repr=False)
    held: threading.Event = field(default_factory=threading.Event, repr=False)
    """Set while an iteration waits because of ``hold``."""

    def hold(self) -> Callable[[float], None]:
        """Stops before the next iteration. Returns a function that allows so many more, ``math.inf`` for all."""
        engine, allowed, changed = next(iter(self.replica.models.values())).engine, 0.0, threading.Condition()
        step = engine.step

        def held() -> Any:
            nonlocal allowed
            with changed:
                if allowed <= 0:
                    self.held.set()
                changed.wait_for(lambda: allowed > 0)
                allowed -= 1
            return step()

        def let(count: float) -> None:
            nonlocal allowed
            with changed:
                allowed += count
                self.held.clear()
                changed.notify_all()

        engine.step = held  # type: ignore[method-assign]
        self.lets.append(let)
        return let

    def ask(self, **fields: Any) -> dict[str, Any]:
        """``POST /v1/videos``; asserts that it is accepted."""
        answer = self.client.post("/v1/videos", json=fields)
        assert answer.status_code == 202, answer.text
        return answer.json()

    def look(self, video: dict[str, Any]) -> dict[str, Any]:
        """``GET /v1/videos/ID``."""
        answer = self.client.get(f"/v1/videos/{video['id']}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def poll(self) -> None:
        """Has the replica look at the queue now."""
        asyncio.run_coroutine_threadsafe(self.replica.queue.poll(), self.loop).result(60)

    def record(self, video: dict[str, Any]) -> JobRecord:
        """The record in the database."""
        record = self.replica.stores.jobs.store.read("anonymous", video["id"])
        assert record is not None
        return record

    def age(self, seconds: float) -> None:
        """Has all jobs end so many seconds earlier, and removes what has expired."""
        age_jobs(self.replica.stores.jobs.store, seconds)
        asyncio.run_coroutine_threadsafe(self.replica.videos.remove_expired(), self.loop).result(60)

    def wait(self, video: dict[str, Any], status: str = "completed", patience: float = 240.0) -> dict[str, Any]:
        """Waits until the video has this status."""
        deadline = time.monotonic() + patience
        while (latest := self.look(video))["status"] != status:
            assert time.monotonic() < deadline, latest
            assert latest["status"] in ("queued", "in_progress"), latest
            time.sleep(0.03)
        return latest

    def stop(self) -> None:
        """Stops like SIGTERM."""
        self.server.should_exit = True
        for let in self.lets:
            let(math.inf)
        self.thread.join(timeout=240)
        assert not self.thread.is_alive()

    def crash(self) -> None:
        """Stops like SIGKILL: the records stay as they are."""

        async def cut() -> None:
            for task in self.replica._loops:
                task.cancel()
            self.replica.stores.close(wait=True)
            for job in self.replica.running:
                self.replica.running.remove(job.record.id)

        asyncio.run_coroutine_threadsafe(cut(), self.loop).result(30)


Serve = Callable[..., Served]


@contextlib.contextmanager
def serving(make_pipeline: Callable[..., ARDiffusionPipeline], folder: Path) -> Iterator[Serve]:
    """What the fixture ``serve`` yields, for ``folder/shared``."""
    with contextlib.ExitStack() as stack:

        def start(
            replica: str = "a", pipelines: Any = None, stopping: threading.Event | None = None, **config: Any
        ) -> Served:
            tree = {"storage": str(folder / "shared"), **QUICK, **config}
            event = stopping or threading.Event()
            served = _start(replica, pipelines or {"tiny": make_pipeline()}, build(ServiceConfig, tree), event)
            stack.callback(served.stop)
            stack.callback(served.client.close)
            return served

        yield start


@pytest.fixture
def serve(make_pipeline: Callable[..., ARDiffusionPipeline], tmp_path: Path) -> Iterator[Serve]:
    """``serve(replica="a", pipelines=None, stopping=None, **config)``: a replica on the folder ``tmp_path/shared``."""
    with serving(make_pipeline, tmp_path) as start:
        yield start


@pytest.fixture(params=["sqlite", "postgresql"])
def serve_on_each(
    request: pytest.FixtureRequest, make_pipeline: Callable[..., ARDiffusionPipeline], tmp_path: Path
) -> Iterator[Serve]:
    """``serve`` with each kind of database."""
    settings = {} if request.param == "sqlite" else request.getfixturevalue("postgres").new_database()
    with serving(make_pipeline, tmp_path) as start:
        yield partial(start, **settings)


class Proxy:
    """Passes connections on to the replica at ``url``, like the load balancer of a cluster."""

    def __init__(self, url: str) -> None:
        self.target = url
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def point(self, url: str) -> None:
        """Breaks all connections. New ones go to another replica."""
        self.target = url
        for connection in self._open:
            with contextlib.suppress(OSError):  # its client has closed it
                connection.shutdown(socket.SHUT_RDWR)
        self._open = []

    def close(self) -> None:
        self.point(self.target)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", httpx.URL(self.target).port or 0))
            self._open += [client, server]
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return


@pytest.fixture
def proxy() -> Iterator[Callable[[str], Proxy]]:
    opened: list[Proxy] = []

    def open_proxy(url: str) -> Proxy:
        opened.append(Proxy(url))
        return opened[-1]

    yield open_proxy
    for each in opened:
        each.close()


def _start(
    name: str, pipelines: dict[str, ARDiffusionPipeline], config: ServiceConfig, stopping: threading.Event
) -> Served:
    listener = socket.socket(proto=socket.IPPROTO_TCP)  # with 0, asyncio does not set TCP_NODELAY
    listener.bind(("127.0.0.1", 0))
    port, made = listener.getsockname()[1], list[Any]()

    async def main() -> None:
        recorder = PrometheusRecorder()
        replica = Replica(pipelines, config, recorder, name, stopping.is_set)
        options = uvicorn.Config(
            build_app(replica, recorder), log_level="error", timeout_graceful_shutdown=1, timeout_keep_alive=600
        )
        server = uvicorn.Server(options)
        made.extend([replica, asyncio.get_running_loop(), server])
        await server.serve(sockets=[listener])

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not (len(made) == 3 and made[2].started):
        assert thread.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    replica, loop, server = made
    url = f"http://127.0.0.1:{port}"
    client = httpx.Client(base_url=url, timeout=240)
    return Served(replica, url, client, loop, server, thread, next(iter(pipelines.values())))
