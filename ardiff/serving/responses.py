"""Responses of the HTTP API: errors, files with ranges of bytes, and streams."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ardiff.serving.errors import JobError, RequestError
from ardiff.serving.records import JobRecord

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; media-src 'self' blob:; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_JOB_ERROR_STATUS = {"cancelled": 409, "deadline": 504, "incomplete": 409, "released": 503, "lost": 503}


def error_response(error: RequestError) -> Response:
    """The error as ``{"error": {"type", "message", "param"}}``."""
    body = {"type": error.kind, "message": str(error), "param": error.param}
    headers = dict(SECURITY_HEADERS)
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": body}, error.status, headers)


def file_response(record: JobRecord, video: bytes, requested_range: str | None) -> Response:
    """The finished video, or a range of its bytes. Raises RequestError 416."""
    headers = {
        **SECURITY_HEADERS,
        "Accept-Ranges": "bytes",
        "Content-Disposition": f'inline; filename="{record.id}.{record.suffix}"',
        "Cache-Control": "private, max-age=3600",
    }
    media_type = (record.media_type or "video/mp4").partition(";")[0]
    span = _parse_range(requested_range, len(video)) if requested_range else None
    if span is None:
        return Response(video, 200, headers, media_type)
    headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{len(video)}"
    return Response(video[span.start : span.stop], 206, headers, media_type)


def _parse_range(header: str, size: int) -> range | None:
    """One range of bytes; None, for the whole file, if the header has another form. Raises RequestError 416."""
    unit, _, text = header.partition("=")
    start, dash, end = text.partition("-")
    if unit.strip() != "bytes" or not dash or not all(t.isdecimal() and len(t) < 19 for t in (start, end) if t):
        return None
    if not start and not end:
        return None
    span = (
        range(int(start), min(int(end) + 1 if end else size, size)) if start else range(max(0, size - int(end)), size)
    )
    if len(span) == 0:
        raise RequestError(416, "range", f"The video has {size} bytes.")
    return span


async def first_chunk(request: Request, chunks: AsyncIterator[bytes]) -> bytes:
    """Waits for the first bytes of a stream, so that an error before them has an HTTP status of its own.

    Raises:
        RequestError: The job ended without a video.
        CancelledError: The client has disconnected.
    """
    first = asyncio.ensure_future(anext(chunks))
    disconnected = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({first, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not first.done():
            raise asyncio.CancelledError("the client has disconnected")
        return first.result()
    except JobError as error:
        raise RequestError(_JOB_ERROR_STATUS.get(error.kind, 500), error.kind, str(error)) from error
    except StopAsyncIteration as error:
        raise RequestError(409, "incomplete", "The video has ended.") from error
    finally:
        first.cancel()
        disconnected.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def stream_response(
    first: bytes,
    chunks: AsyncIterator[bytes],
    record: JobRecord,
    resources: contextlib.ExitStack,
    headers: dict[str, str] | None = None,
) -> Response:
    """Sends the first chunk and all others as they come. Closes ``resources`` when the response ends, or is aborted."""

    async def body() -> AsyncIterator[bytes]:
        yield first
        async for chunk in chunks:
            yield chunk

    headers = {**SECURITY_HEADERS, **(headers or {}), "Cache-Control": "no-store"}
    response = _ClosingStream(body(), 200, headers, record.media_type or "video/mp4")
    response.resources = resources
    return response


class _ClosingStream(StreamingResponse):
    resources: contextlib.ExitStack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.resources:
            await super().__call__(scope, receive, send)
