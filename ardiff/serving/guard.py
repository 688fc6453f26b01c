"""Middleware in front of all routes: rejects bodies that are too large and, without API keys, other hosts and sites."""

import contextlib
import ipaddress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ardiff.serving.config import ServiceConfig
from ardiff.serving.errors import RequestError
from ardiff.serving.metrics import Recorder
from ardiff.serving.responses import error_response


class Guard:
    """Without API keys only host names of this machine are served, and only their own page may send requests.

    Otherwise a page of another site could use the service through a browser on this machine.
    """

    def __init__(self, app: ASGIApp, config: ServiceConfig, metrics: Recorder) -> None:
        self.app, self.config, self.metrics = app, config, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        error = self._check(Headers(scope=scope), scope["path"])
        if error is not None:
            self.metrics.record("ardiff_errors", 1, kind=error.kind)
            await error_response(error)(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.config.limits.body_bytes:
                raise self._too_large()
            return message

        await self.app(scope, counted, send)

    def _check(self, headers: Headers, path: str) -> RequestError | None:
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > self.config.limits.body_bytes:
            return self._too_large()
        if self.config.keys or self.config.allow_anonymous or path == "/healthz":
            return None
        host = headers.get("host", "")
        if not _is_loopback(host):
            return RequestError(403, "forbidden", "Without API keys only this machine is served: set service.keys.")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return RequestError(403, "forbidden", "Pages of other sites may not use this service.")
        return None

    def _too_large(self) -> RequestError:
        limit = self.config.limits.body_bytes
        return RequestError(413, "too_large", f"The body may have at most {limit} bytes.")


def _is_loopback(host: str) -> bool:
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    if name == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    return False
