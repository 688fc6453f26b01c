"""Calls the database and storage from the event loop, and keeps track of whether they are available."""

import asyncio
import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Literal, ParamSpec, TypeVar

from ardiff.errors import DataError, DecodeError
from ardiff.serving.config import ServiceConfig
from ardiff.serving.database import Database
from ardiff.serving.errors import UnavailableError
from ardiff.serving.files import JobFiles
from ardiff.serving.metrics import Recorder
from ardiff.serving.store import JobStore

logger = logging.getLogger(__name__)
DATABASE_THREADS, STORAGE_THREADS = 3, 8
"""Calls at the same time. A replica has one connection to the database for each, and one for heartbeats."""
P = ParamSpec("P")
ResultT = TypeVar("ResultT")
StoreT = TypeVar("StoreT")


class AsyncStore(Generic[StoreT]):
    """Runs methods of a :class:`~ardiff.serving.store.JobStore` or :class:`~ardiff.serving.files.JobFiles` in threads.

    >>> record = await jobs.call(jobs.store.read, owner, job_id)
    """

    def __init__(
        self, store: StoreT, kind: Literal["database", "storage"], timeout: float, threads: int, metrics: Recorder
    ) -> None:
        """
        Args:
            kind: What is unavailable when a call fails, for messages and metrics.
            timeout: Seconds after which ``call_timed`` gives up.
            threads: Calls at the same time.
        """
        self.store, self.available = store, True
        self._kind, self._timeout, self._metrics = kind, timeout, metrics
        self._pending = 0
        self._threads = ThreadPoolExecutor(threads, kind)

    async def call(self, operation: Callable[P, ResultT], *args: P.args, **kwargs: P.kwargs) -> ResultT:
        """Runs a method of the store without a timeout. Raises UnavailableError if it is unavailable.

        A DecodeError of the method is raised as it is.
        """
        self._pending += 1
        try:
            call = functools.partial(operation, *args, **kwargs)
            result = await asyncio.get_running_loop().run_in_executor(self._threads, call)
        except DecodeError:  # what was read is damaged
            raise
        except DataError as error:
            raise self._failed(error) from error
        finally:
            self._pending -= 1
        self._set_available(True)
        return result

    async def call_timed(self, operation: Callable[P, ResultT], *args: P.args, **kwargs: P.kwargs) -> ResultT:
        """Like ``call`` for a waiting client: also raises UnavailableError after the timeout."""
        try:
            async with asyncio.timeout(self._timeout):
                return await self.call(operation, *args, **kwargs)
        except TimeoutError as error:
            raise self._failed(error) from error

    def check_responsive(self) -> None:
        """Raises UnavailableError while the store is unavailable and other calls already wait for its response."""
        if self._pending and not self.available:
            raise UnavailableError(self._kind)

    def close(self, wait: bool = False) -> None:
        self._threads.shutdown(wait=wait)

    def _failed(self, error: Exception) -> UnavailableError:
        self._set_available(False)
        logger.warning("%s: %s", self._kind.capitalize(), error or "no response")
        return UnavailableError(self._kind)

    def _set_available(self, available: bool) -> None:
        self.available = available
        self._metrics.record(f"ardiff_{self._kind}_up", float(available))


class Stores:
    """What all replicas share: the jobs in the database, and their files."""

    def __init__(self, config: ServiceConfig, metrics: Recorder) -> None:
        seconds, threads = config.storage_seconds, DATABASE_THREADS
        jobs = JobStore(Database(config.database_uri, config.database_password, threads + 1, seconds))
        self.jobs = AsyncStore(jobs, "database", seconds, threads, metrics)
        self.heartbeats = AsyncStore(jobs, "database", seconds, 1, metrics)
        """A thread of its own, so that other calls do not delay heartbeats."""
        self.files = AsyncStore(JobFiles(config.storage), "storage", seconds, STORAGE_THREADS, metrics)

    def close(self, wait: bool = False) -> None:
        """Stops the threads after their current calls; with ``wait``, returns after those."""
        for store in (self.jobs, self.heartbeats, self.files):
            store.close(wait)
        self.jobs.store.database.close()
