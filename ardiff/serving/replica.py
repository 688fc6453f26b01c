"""A replica of the service: loads the parts, runs their loops, and shuts them down.

A request passes :mod:`~ardiff.serving.admission` and waits in the :mod:`~ardiff.serving.queue` of all replicas. One of
them takes it and runs it in a :mod:`~ardiff.serving.model_runner`, whose frames go to readers
(:mod:`~ardiff.serving.streaming`) and to the other replicas (:mod:`~ardiff.serving.progress`) as they are finished.
:mod:`~ardiff.serving.completion` writes the end. Leases decide which replica runs a job
(:mod:`~ardiff.serving.store`): after a crash another replica continues it, or records the failure.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping

from ardiff.errors import ConfigError
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.serving.admission import Admission
from ardiff.serving.async_store import Stores
from ardiff.serving.completion import JobFinisher
from ardiff.serving.config import ServiceConfig
from ardiff.serving.errors import JobError, RequestError
from ardiff.serving.hls import HlsStreams
from ardiff.serving.jobs import RunningJobs
from ardiff.serving.keys import ApiKeys
from ardiff.serving.metrics import Recorder
from ardiff.serving.model_runner import ModelRunner
from ardiff.serving.progress import ProgressPublisher
from ardiff.serving.queue import JobQueue
from ardiff.serving.shutdown import Shutdown
from ardiff.serving.streaming import Streams
from ardiff.serving.videos import Videos

logger = logging.getLogger(__name__)
RELEASE_SECONDS = 10.0
"""Seconds, after the time for draining, in which unfinished jobs return to the queue."""


class Replica:
    """Serves one or more models. ``start`` it inside a running event loop."""

    def __init__(
        self,
        pipelines: Mapping[str, ARDiffusionPipeline],
        config: ServiceConfig,
        metrics: Recorder,
        name: str,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            stop_requested: Whether the host wants this replica to stop; called before each look at the queue. A host
                may wait for open connections before it calls ``stop``.

        Raises:
            ConfigError: There is no model, the engine cannot sample one, or the key file is not valid.
        """
        if not pipelines:
            raise ConfigError("There is no model to serve: give checkpoint=URI, or models.NAME=URI.")
        self.config, self.metrics, self.name = config, metrics, name
        self.keys = ApiKeys(config)
        self.shutdown = Shutdown(stop_requested, config.drain_seconds)
        self.stores = Stores(config, metrics)
        self.running = RunningJobs(metrics)
        self._publisher = ProgressPublisher(self.stores, self.running)
        self.finisher = JobFinisher(self.stores, self.running, self._publisher, config, metrics)
        self.models = {
            name: ModelRunner(name, pipeline, config, metrics, self._publisher.publish_now, self.finisher.finish)
            for name, pipeline in pipelines.items()
        }
        self.queue = JobQueue(
            self.stores, self.running, self.models, self.finisher, config, metrics, self.shutdown.check
        )
        self.finisher.on_finished = self.queue.notify
        self.videos = Videos(self.stores, self.running, self.finisher, config)
        self.streams = Streams(self.videos, self.stores, self.running, self.keys, config, self.shutdown)
        self.hls = HlsStreams(self.videos, self.stores)
        self.admission = Admission(self.models, self.keys, self.stores, self.queue, self.running, config, self.shutdown)
        self._loops: list[asyncio.Task[None]] = []
        self._draining: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts the loops. Prepares database and storage if they are available, else the first poll does so.

        Raises:
            ConfigError: A newer release has changed the database.
        """
        with contextlib.suppress(RequestError):
            await self.queue.prepare()
        config = self.config
        loops = [runner.run() for runner in self.models.values()]
        loops += [
            _every(config.poll_seconds, self._check_shutdown),  # also while the queue waits for the database
            _every(config.poll_seconds, self.queue.poll, self.queue.changed),
            _every(config.heartbeat_seconds, self._publisher.send_heartbeats),
            _every(config.segment_seconds, self._publisher.publish),
            _every(self.videos.sweep_seconds, self.videos.remove_expired),
            _every(config.keys_seconds, self.keys.reload),
        ]
        self._loops = [asyncio.ensure_future(loop) for loop in loops]

    async def stop(self) -> None:
        """Drains the replica, then ends its loops."""
        self.shutdown.begin()
        await self._check_shutdown()
        assert self._draining is not None
        await self._draining
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        for runner in self.models.values():
            runner.close()
        self.stores.close()

    @property
    def healthy(self) -> bool:
        """Whether all loops run. Only a bug ends one."""
        return not any(loop.done() for loop in self._loops)

    async def _check_shutdown(self) -> None:
        if self.shutdown.check() and self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        """Lets the running jobs end until the time for draining is over, then returns the others to the queue."""
        logger.info("Draining: %d running jobs, for at most %g s.", len(self.running), self.config.drain_seconds)
        await self._wait_for_jobs(self.shutdown.deadline)
        for job in self.running:
            job.stop(JobError("released", "The replica that generated the video was stopped."))
        await self._wait_for_jobs(time.monotonic() + RELEASE_SECONDS)

    async def _wait_for_jobs(self, deadline: float) -> None:
        while (self.running or self.finisher.busy) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)


async def _every(
    seconds: float,
    action: Callable[[], Awaitable[None]],
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Runs ``action`` again and again with pauses. Continues after an outage."""
    while True:
        try:
            await action()
        except RequestError:
            await asyncio.sleep(seconds)
        await pause(seconds)
