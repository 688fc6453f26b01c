"""Responses of the HTTP API: errors, files with ranges of bytes, and streams."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ardiff.data.storage import RangeReader, read_range
from ardiff.serving.async_store import AsyncStore
from ardiff.serving.errors import JobError, RequestError, video_unavailable
from ardiff.serving.records import JobRecord

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; media-src 'self' blob:; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
PIECE_BYTES = 2**20
"""Bytes of a video that are in memory for a response."""
_JOB_ERROR_STATUS = {"cancelled": 409, "deadline": 504, "released": 503, "lost": 503}


def error_response(error: RequestError) -> Response:
    """The error as ``{"error": {"type", "code", "message", "param"}}``."""
    body = {"type": error.kind, "code": error.kind, "message": str(error), "param": error.param}
    headers = SECURITY_HEADERS | error.headers
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": body}, error.status, headers)


async def file_response(request: Request, record: JobRecord, video: RangeReader, files: AsyncStore) -> Response:
    """The finished video, or a range of its bytes, read piece by piece. Raises RequestError 416 or 503."""
    etag = f'"{record.id}.{video.size}"'
    headers = SECURITY_HEADERS | {"ETag": etag, "Accept-Ranges": "bytes", "Cache-Control": "private, max-age=3600"}
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if etag in known or "*" in known:
        return Response(None, 304, headers)
    span = None
    if request.method == "GET" and request.headers.get("if-range", etag) == etag:
        span = _parse_range(request.headers.get("range", ""), video.size)
    if span is not None:
        headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{video.size}"
    status, span = (200, range(video.size)) if span is None else (206, span)
    headers["Content-Disposition"] = f'inline; filename="{record.id}.{record.suffix}"'
    headers["Content-Length"] = str(len(span))
    media_type = (record.media_type or "video/mp4").partition(";")[0]
    if request.method == "HEAD":
        return Response(None, status, headers, media_type)

    async def pieces() -> AsyncIterator[bytes]:
        for start in span[::PIECE_BYTES]:
            yield await files.call(read_range, video.uri, start, min(PIECE_BYTES, span.stop - start))

    body = pieces()
    first = await anext(body, b"")  # an error has an HTTP status of its own
    return StreamingResponse(chain(first, body), status, headers, media_type)


async def chain(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yields ``first``, then the rest."""
    yield first
    async for data in rest:
        yield data


def _parse_range(header: str, size: int) -> range | None:
    """One range of bytes; None, for the whole file, if the header has another form. Raises RequestError 416."""
    unit, _, text = header.partition("=")
    start, dash, end = text.partition("-")
    if unit.strip() != "bytes" or not dash or not all(t.isdecimal() and len(t) < 19 for t in (start, end) if t):
        return None
    if not (start or end) or (start and end and int(end) < int(start)):
        return None
    span = (
        range(int(start), min(int(end) + 1 if end else size, size)) if start else range(max(0, size - int(end)), size)
    )
    if len(span) == 0:
        raise RequestError(416, "range", f"The video has {size} bytes.", headers={"Content-Range": f"bytes */{size}"})
    return span


async def first_chunk(request: Request, chunks: AsyncIterator[bytes]) -> bytes:
    """Waits for the first bytes of a stream, so that an error before them has an HTTP status of its own. Returns none
    if the stream has ended and its reader has all bytes.

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
    except StopAsyncIteration:
        return b""
    finally:
        first.cancel()
        disconnected.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def check_streamable(request: Request) -> None:
    """Raises RequestError 505 for HTTP/1.0, which has no chunks: the length of a stream is not known before its end."""
    if request.scope["http_version"] == "1.0":
        raise RequestError(
            505, "http_version", "A stream needs HTTP/1.1: use it, or GET the content when it is finished."
        )


def stream_head(record: JobRecord) -> Response:
    """The headers of a stream, without waiting for it. Raises RequestError for a job without a video."""
    if record.ended and record.status != "completed":
        raise video_unavailable(record)
    return Response(None, 200, SECURITY_HEADERS | {"Cache-Control": "no-store"}, record.media_type or "video/mp4")


def parse_stream_tag(header: str | None) -> int | None:
    """The lease under which the stream with this ETag began. Raises RequestError 412 for another text."""
    if header is None:
        return None
    tag = header.strip().removeprefix('"').removesuffix('"')
    if not tag.isdecimal() or len(tag) > 9:
        raise RequestError(412, "restarted", "If-Match is not the ETag of a stream of this video.")
    return int(tag)


def stream_response(
    first: bytes,
    chunks: AsyncIterator[bytes],
    record: JobRecord,
    resources: contextlib.ExitStack,
    headers: dict[str, str] | None = None,
) -> Response:
    """Sends the first chunk and all others as they come. Closes ``resources`` when the response ends, or is aborted."""

    headers = {**SECURITY_HEADERS, **(headers or {}), "Cache-Control": "no-store"}
    if record.status != "completed":  # the stream of a file has other bytes
        headers["ETag"] = f'"{record.begun}"'
    response = _ClosingStream(chain(first, chunks), 200, headers, record.media_type or "video/mp4")
    response.resources = resources
    return response


class _ClosingStream(StreamingResponse):
    resources: contextlib.ExitStack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.resources:
            await super().__call__(scope, receive, send)
