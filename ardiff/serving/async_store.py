"""Calls the job store from the event loop, and keeps track of whether storage is available."""

import asyncio
import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from ardiff.errors import DataError, DecodeError
from ardiff.serving.errors import RequestError
from ardiff.serving.metrics import Recorder
from ardiff.serving.records import JobRecord
from ardiff.serving.store import JobStore

logger = logging.getLogger(__name__)
P = ParamSpec("P")
ResultT = TypeVar("ResultT")


class AsyncStore:
    """Runs methods of a :class:`JobStore` in threads.

    >>> record = await storage.call(storage.store.read, owner, job_id)
    """

    def __init__(self, store: JobStore, timeout: float, max_heartbeats: int, metrics: Recorder) -> None:
        """
        Args:
            timeout: Seconds after which ``call_timed`` gives up.
            max_heartbeats: Heartbeats that may be written at the same time. They have threads of their own, so that
                other calls do not delay them.
        """
        self.store, self.available = store, True
        self._timeout, self._metrics = timeout, metrics
        self._pending = 0
        self._threads = ThreadPoolExecutor(8, "storage")
        self._heartbeat_threads = ThreadPoolExecutor(max_heartbeats, "heartbeats")

    async def call(self, operation: Callable[P, ResultT], *args: P.args, **kwargs: P.kwargs) -> ResultT:
        """Runs a method of the store without a timeout. Raises RequestError 503 if storage is unavailable.

        A DecodeError of the method is raised as it is.
        """
        return await self._run(self._threads, functools.partial(operation, *args, **kwargs))

    async def call_timed(self, operation: Callable[P, ResultT], *args: P.args, **kwargs: P.kwargs) -> ResultT:
        """Like ``call`` for a waiting client: also raises RequestError 503 after the timeout."""
        try:
            return await asyncio.wait_for(self.call(operation, *args, **kwargs), self._timeout)
        except TimeoutError as error:
            raise self._failed(error) from error

    async def heartbeat(self, record: JobRecord) -> None:
        """Renews a job's lease. Raises RequestError 503 if storage is unavailable."""
        await self._run(self._heartbeat_threads, functools.partial(self.store.heartbeat, record))

    def check_responsive(self) -> None:
        """Raises RequestError 503 while storage is unavailable and other calls already wait for its response."""
        if self._pending and not self.available:
            raise _unavailable()

    def close(self, wait: bool = False) -> None:
        """Stops the threads after their current calls; with ``wait``, returns after those."""
        self._threads.shutdown(wait=wait)
        self._heartbeat_threads.shutdown(wait=wait)

    async def _run(self, threads: ThreadPoolExecutor, operation: Callable[[], ResultT]) -> ResultT:
        self._pending += 1
        try:
            result = await asyncio.get_running_loop().run_in_executor(threads, operation)
        except DecodeError:  # what was read is damaged
            raise
        except DataError as error:
            raise self._failed(error) from error
        finally:
            self._pending -= 1
        self._set_available(True)
        return result

    def _failed(self, error: Exception) -> RequestError:
        self._set_available(False)
        logger.warning("Storage: %s", error or "no response")
        return _unavailable()

    def _set_available(self, available: bool) -> None:
        self.available = available
        self._metrics.record("ardiff_storage_up", float(available))


def _unavailable() -> RequestError:
    message = "The storage of jobs is unavailable: try again."
    return RequestError(503, "storage_unavailable", message, retry_after=5)
