"""Middleware in front of all routes: limits headers and bodies and, without API keys, rejects other hosts and sites."""

import asyncio
import contextlib
import ipaddress
import math

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ardiff.serving.config import RequestLimits, ServiceConfig
from ardiff.serving.errors import RequestError
from ardiff.serving.metrics import Recorder
from ardiff.serving.responses import error_response

MAX_HEADERS, MAX_HEADER_BYTES = 100, 32768


class Guard:
    """Without API keys only host names of this machine are served, and only their own page may send requests.

    Otherwise a page of another site could use the service through a browser on this machine.
    """

    def __init__(self, app: ASGIApp, config: ServiceConfig, metrics: Recorder) -> None:
        self.app, self.config, self.metrics = app, config, metrics
        self.bodies = Bodies(config.limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        error = self._check(Headers(scope=scope), scope["path"])
        if error is not None:
            self.metrics.record("ardiff_errors", 1, kind=error.kind)
            await error_response(error)(scope, receive, send)
            return
        await self.app(scope, self.bodies.limited(receive), send)

    def _check(self, headers: Headers, path: str) -> RequestError | None:
        if len(headers.raw) > MAX_HEADERS or sum(len(k) + len(v) for k, v in headers.raw) > MAX_HEADER_BYTES:
            message = f"At most {MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes together are accepted."
            return RequestError(431, "headers_too_large", message)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > self.config.limits.body_bytes:
            return _too_large(self.config.limits)
        if self.config.keys or self.config.allow_anonymous or path == "/healthz":
            return None
        host = headers.get("host", "")
        if not _is_loopback(host):
            return RequestError(403, "forbidden", "Without API keys only this machine is served: set service.keys.")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host and origin not in self.config.cors_origins:
            return RequestError(403, "forbidden", "Pages of other sites may not use this service.")
        return None


class Body:
    """A body that has not arrived completely."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        """When it must be complete, by the event loop's clock."""
        self.waiting: asyncio.Timeout | None = None
        """The wait for its next bytes."""

    def give_up(self) -> None:
        """Ends the wait for this body."""
        self.deadline = 0.0
        if self.waiting is not None:
            self.waiting.reschedule(0.0)


class Bodies:
    """The bodies that are arriving. They have limits of size, time and number, so that unfinished ones block nothing.

    Above the number, the oldest unfinished body is given up: one that makes progress is complete soon.
    """

    def __init__(self, limits: RequestLimits) -> None:
        self._limits = limits
        self._unfinished: list[Body] = []

    def limited(self, receive: Receive) -> Receive:
        """``receive`` with limits. It raises RequestError 408 or 413."""
        received, body = 0, None

        async def limited() -> Message:
            nonlocal received, body
            if body is None:
                body = self._begin()
            try:
                async with asyncio.timeout_at(body.deadline) as body.waiting:
                    message = await receive()
            except TimeoutError as error:
                self._end(body)
                text = "The body did not arrive in time: send it again."
                raise RequestError(408, "body_timeout", text, headers={"Connection": "close"}) from error
            except BaseException:
                self._end(body)
                raise
            finally:
                body.waiting = None
            received += len(message.get("body", b""))
            if not message.get("more_body", False):
                body.deadline = math.inf  # the next messages only tell that the client has disconnected
                self._end(body)
            if received > self._limits.body_bytes:
                self._end(body)
                raise _too_large(self._limits)
            return message

        return limited

    def _begin(self) -> Body:
        while len(self._unfinished) >= self._limits.unfinished_bodies:
            self._unfinished.pop(0).give_up()
        body = Body(asyncio.get_running_loop().time() + self._limits.body_seconds)
        self._unfinished.append(body)
        return body

    def _end(self, body: Body) -> None:
        if body in self._unfinished:
            self._unfinished.remove(body)


def _too_large(limits: RequestLimits) -> RequestError:
    return RequestError(413, "too_large", f"The body may have at most {limits.body_bytes} bytes.")


def _is_loopback(host: str) -> bool:
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    if name == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    return False
