"""The HTTP interface, shaped like the video interfaces that are in use, and documented by ``/openapi.json``.

This module must not postpone the evaluation of annotations: FastAPI reads them.
"""

import asyncio
import contextlib
import ipaddress
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import resources
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ardiff.serving.config import RequestLimits
from ardiff.serving.keys import ANONYMOUS, find_owner
from ardiff.serving.metrics import PrometheusRecorder
from ardiff.serving.records import JobRecord, suffix
from ardiff.serving.requests import (
    DeletedVideo,
    ErrorAnswer,
    Health,
    ModelList,
    RequestError,
    Video,
    VideoList,
    VideoRequest,
    invalid,
    public,
)
from ardiff.serving.runner import Job, JobError
from ardiff.serving.service import VideoService

_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; media-src 'self' blob:; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_MEANINGS = {
    400: "The body cannot be read.",
    401: "The API key is missing or wrong.",
    403: "Without API keys only this machine may ask.",
    404: "There is no such video.",
    409: "There is no video, or not yet.",
    410: "The video has expired.",
    413: "The body is too large.",
    415: "The body is of another type.",
    416: "The range is outside the video.",
    422: "A value cannot be accepted.",
    429: "Too many requests, unfinished videos or open streams; see Retry-After.",
    500: "The generation failed.",
    503: "The service is busy or its storage is away; see Retry-After.",
    504: "The video was not ready before its deadline.",
}


def _documented_body(limits: RequestLimits) -> dict[str, Any]:
    """The body of a request for the OpenAPI document, with the limits of this service."""
    schema = VideoRequest.model_json_schema()
    fields = schema["properties"]
    for name in ("num_frames", "num_inference_steps", "guidance_scale"):
        fields[name]["maximum"] = getattr(limits, name)
    fields["fps"]["anyOf"][0]["maximum"] = limits.fps
    upload = {
        "type": "string",
        "format": "binary",
        "description": "A picture (PNG, JPEG, WebP) or a short clip, which the video continues.",
    }
    form = {**schema, "properties": {**fields, "input_reference": upload}}
    content = {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}


def build_app(service: VideoService, recorder: PrometheusRecorder) -> FastAPI:
    """The application of one replica; it starts the service and, when it ends, has it drained."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="ardiff",
        version="1",
        description="Videos by asynchronous auto-regressive diffusion: as jobs, or streamed while they are generated.",
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    _add_errors(app, service)
    _add_page(app)
    _add_operations(app, service, recorder)
    _add_videos(app, service)
    app.add_middleware(_Guard, service=service)
    return app


def _answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    common = (401, 403, 422, 503)
    return {s: {"model": ErrorAnswer, "description": _MEANINGS[s]} for s in sorted({*statuses, *common})}


def _add_errors(app: FastAPI, service: VideoService) -> None:
    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        service.metrics.record("ardiff_errors", 1, kind=error.kind)
        return _refusal(error)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return await refused(request, _first(error.errors()))

    @app.exception_handler(HTTPException)
    async def no_such(request: Request, error: HTTPException) -> Response:
        answer = _refusal(RequestError(error.status_code, "not_found", str(error.detail)))
        answer.headers.update(error.headers or {})
        return answer


def _refusal(error: RequestError) -> Response:
    body = {"type": error.kind, "message": str(error), "param": error.param}
    headers = dict(_HEADERS)
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": body}, error.status, headers)


def _add_page(app: FastAPI) -> None:
    folder = resources.files("ardiff.serving") / "page"

    def add(path: str, content: bytes, media_type: str) -> None:
        @app.get(path, include_in_schema=False)
        async def page() -> Response:
            return Response(content, media_type=media_type, headers=_HEADERS | {"Cache-Control": "no-cache"})

    for path, (name, media_type) in _PAGE.items():
        add(path, (folder / name).read_bytes(), media_type)


def _add_operations(app: FastAPI, service: VideoService, recorder: PrometheusRecorder) -> None:
    owner = _owner_of(service)

    @app.get("/healthz", responses={503: {"model": Health, "description": "The replica does not work."}})
    async def health(response: Response) -> Health:
        """Whether this replica works. Storage that is away degrades it: running streams go on."""
        up = service.storage_up
        if not service.healthy:
            response.status_code = 503
        return Health(
            status="ok" if up and service.healthy else "degraded",
            storage="ok" if up else "unreachable",
            replica=service.replica,
            running=service.load,
            waiting=service.waiting,
        )

    @app.get("/metrics", response_class=Response, responses=_answers())
    async def metrics(owner: Annotated[str, Depends(owner)]) -> Response:
        """Figures of this replica in Prometheus' format."""
        return Response(recorder.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", responses=_answers())
    async def models(owner: Annotated[str, Depends(owner)]) -> ModelList:
        """The checkpoints that can be asked for, and their limits."""
        return ModelList(data=[model.public(service.config) for model in service.models.values()])


def _add_videos(app: FastAPI, service: VideoService) -> None:
    owner, body = _owner_of(service), _documented_body(service.config.limits)
    Owner = Annotated[str, Depends(owner)]

    @app.post(
        "/v1/videos",
        status_code=202,
        openapi_extra=body,
        responses=_answers(400, 413, 415, 429),
    )
    async def create(request: Request, response: Response, owner: Owner) -> Video:
        """Asks for a video; answers at once with its identifier."""
        asked, upload = await _read(request)
        record, _ = await service.create(owner, asked, upload, streaming=False)
        response.headers["Location"] = f"/v1/videos/{record.id}"
        return public(record)

    @app.post(
        "/v1/videos:stream",
        response_class=StreamingResponse,
        openapi_extra=body,
        responses=_answers(400, 409, 413, 415, 429, 500, 504) | _VIDEO_ANSWER,
    )
    async def create_and_stream(request: Request, owner: Owner) -> Response:
        """Asks for a video and sends it while it is generated; closing the connection cancels it."""
        asked, upload = await _read(request)
        with contextlib.ExitStack() as until_closed:
            until_closed.enter_context(service.reading(owner))
            _, job = await service.create(owner, asked, upload, streaming=True)
            assert job is not None
            until_closed.callback(_close, service, job)
            parts, first = await _first_part(request, job.log.follow())
            headers = {"X-Video-Id": job.record.id, "Location": f"/v1/videos/{job.record.id}"}
            return _stream(parts, first, job.record, headers, until_closed.pop_all())

    @app.get("/v1/videos", responses=_answers())
    async def list_videos(
        owner: Owner,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[str | None, Query(max_length=64, description="Go on after this video.")] = None,
    ) -> VideoList:
        """The key's videos, newest first."""
        records, more = await service.list_jobs(owner, limit, after)
        return VideoList(data=[public(record) for record in records], has_more=more)

    @app.get("/v1/videos/{video_id}", responses=_answers(404))
    async def find(video_id: str, owner: Owner) -> Video:
        """How far a video is."""
        return public(await service.find(owner, video_id))

    @app.delete("/v1/videos/{video_id}", responses=_answers(404))
    async def cancel(video_id: str, owner: Owner) -> Video | DeletedVideo:
        """Cancels a video before its next iteration, or removes one that has ended."""
        record = await service.cancel_or_delete(owner, video_id)
        return DeletedVideo(id=video_id) if record is None else public(record)

    @app.get(
        "/v1/videos/{video_id}/content",
        response_class=Response,
        responses=_answers(404, 409, 410, 416) | _VIDEO_ANSWER | {206: {"description": "A part."}},
    )
    async def content(video_id: str, request: Request, owner: Owner) -> Response:
        """The finished video as a file; a range of bytes if one is asked for."""
        record, data = await service.video(owner, video_id)
        return _file(record, data, request.headers.get("range"))

    @app.get(
        "/v1/videos/{video_id}/stream",
        response_class=StreamingResponse,
        responses=_answers(404, 409, 410, 429, 500, 504) | _VIDEO_ANSWER,
    )
    async def stream(video_id: str, request: Request, owner: Owner) -> Response:
        """The video from its beginning while it is generated; closing the connection leaves the job alone."""
        with contextlib.ExitStack() as until_closed:
            until_closed.enter_context(service.reading(owner))
            await service.find(owner, video_id)
            parts, first = await _first_part(request, service.follow(owner, video_id))
            return _stream(parts, first, await service.find(owner, video_id), {}, until_closed.pop_all())


_VIDEO_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"description": "The video.", "content": {"video/mp4": {}, "video/webm": {}}}
}


def _owner_of(service: VideoService) -> Callable[[Request], Awaitable[str]]:
    async def owner(request: Request) -> str:
        """Whose key the request carries. Raises RequestError 401."""
        if not service.config.keys:
            return ANONYMOUS
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        found = find_owner(service.keys, key.strip()) if scheme.lower() == "bearer" else None
        if found is None:
            raise RequestError(401, "unauthorized", "Give a valid API key: `Authorization: Bearer KEY`.")
        return found

    return owner


async def _read(request: Request) -> tuple[VideoRequest, bytes | None]:
    """The request's fields and upload. Raises RequestError 4xx."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return _validate(_json(await request.body()), strict=True), None
    if kind != "multipart/form-data":
        raise RequestError(415, "unsupported_type", "Send application/json, or multipart/form-data with a file.")
    try:
        form = await request.form(max_files=1, max_fields=32, max_part_size=2**16)
    except HTTPException as error:
        raise RequestError(400, "malformed", f"The form cannot be read: {error.detail}") from error
    try:
        fields: dict[str, Any] = {}
        upload = None
        for name, value in form.multi_items():
            if name in fields or (name == "input_reference" and upload is not None):
                raise invalid(name[:64], f"{name[:64]} is given twice.")
            if isinstance(value, UploadFile) != (name == "input_reference"):
                raise invalid(name[:64], "input_reference, and only it, must be a file.")
            if isinstance(value, UploadFile):
                upload = await value.read()
            elif value:
                fields[name] = value
    finally:
        await form.close()
    return _validate(fields, strict=False), upload


def _json(body: bytes) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    try:
        fields = json.loads(body, parse_constant=refuse)
        json.dumps(fields, ensure_ascii=False).encode()  # half a surrogate pair cannot be written, so not be answered
        return fields
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "malformed", "The body is not valid JSON.") from error


def _validate(fields: Any, strict: bool) -> VideoRequest:
    try:
        return VideoRequest.model_validate(fields, strict=strict)
    except ValidationError as error:
        raise _first(error.errors()) from error


def _first(errors: Any) -> RequestError:
    error = errors[0]
    place = [str(part) for part in error["loc"] if part not in ("query", "path", "body")]
    param = place[0][:64] if place else None
    return invalid(param, f"{param or 'The body'}: {error['msg'][0].lower()}{error['msg'][1:200]}.")


async def _first_part(request: Request, parts: AsyncIterator[bytes]) -> tuple[AsyncIterator[bytes], bytes]:
    """Waits for the first bytes, so that what goes wrong before them has a status of its own."""
    begin = asyncio.ensure_future(anext(parts))
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({begin, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not begin.done():
            raise asyncio.CancelledError("the client has gone")
        return parts, begin.result()
    except (JobError, StopAsyncIteration) as error:
        kind = getattr(error, "kind", "incomplete")
        status = {"cancelled": 409, "deadline": 504, "incomplete": 409, "released": 503, "lost": 503}.get(kind, 500)
        raise RequestError(status, kind, str(error) or "The video has ended.") from error
    finally:
        begin.cancel()
        gone.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _ClosingStream(StreamingResponse):
    """Lets go of what it holds when it is over, however that came about."""

    until_closed: contextlib.ExitStack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.until_closed:
            await super().__call__(scope, receive, send)


def _close(service: VideoService, job: Job) -> None:
    if not job.log.ended:
        service.stop_stream(job)


def _stream(
    parts: AsyncIterator[bytes],
    first: bytes,
    record: JobRecord,
    headers: dict[str, str],
    until_closed: contextlib.ExitStack,
) -> Response:
    async def body() -> AsyncIterator[bytes]:
        yield first
        async for part in parts:
            yield part

    media_type = record.media_type or "video/mp4"
    answer = _ClosingStream(body(), 200, {**_HEADERS, **headers, "Cache-Control": "no-store"}, media_type)
    answer.until_closed = until_closed
    return answer


def _file(record: JobRecord, data: bytes, asked: str | None) -> Response:
    headers = {
        **_HEADERS,
        "Accept-Ranges": "bytes",
        "Content-Disposition": f'inline; filename="{record.id}.{suffix(record)}"',
        "Cache-Control": "private, max-age=3600",
    }
    media_type = (record.media_type or "video/mp4").partition(";")[0]
    span = _range(asked, len(data)) if asked else None
    if span is None:
        return Response(data, 200, headers, media_type)
    headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{len(data)}"
    return Response(data[span.start : span.stop], 206, headers, media_type)


def _range(asked: str, size: int) -> range | None:
    """One range of bytes, or None for the whole where the header is none that is known. Raises RequestError 416."""
    unit, _, text = asked.partition("=")
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


class _Guard:
    """In front of everything: bodies that are too large, and, where no key is needed, who may ask at all.

    Without keys, only names of this machine are answered, and no page of another site may send anything: a browser on
    this machine would otherwise do it for them.
    """

    def __init__(self, app: ASGIApp, service: VideoService) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refuse(Headers(scope=scope), scope)
        if refusal is not None:
            self.service.metrics.record("ardiff_errors", 1, kind=refusal.kind)
            await _refusal(refusal)(scope, receive, send)
            return
        limit, count = self.service.config.limits.body_bytes, 0

        async def counted() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > limit:
                raise self._too_large()
            return message

        await self.app(scope, counted, send)

    def _refuse(self, headers: Headers, scope: Scope) -> RequestError | None:
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > self.service.config.limits.body_bytes:
            return self._too_large()
        if self.service.config.keys or self.service.config.allow_anonymous or scope["path"] == "/healthz":
            return None
        host = headers.get("host", "")
        if not _is_loopback(host):
            return RequestError(403, "forbidden", "Without API keys only this machine is served: give `keys`.")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return RequestError(403, "forbidden", "Pages of other sites may not use this service.")
        return None

    def _too_large(self) -> RequestError:
        limit = self.service.config.limits.body_bytes
        return RequestError(413, "too_large", f"The body may have at most {limit} bytes.")


def _is_loopback(host: str) -> bool:
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    if name == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    return False
