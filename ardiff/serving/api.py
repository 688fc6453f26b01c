"""The HTTP API, shaped like the video APIs in use, and documented by ``/openapi.json``.

This module must not postpone the evaluation of annotations: FastAPI reads them.
"""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import resources
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException

from ardiff.serving.errors import JobError, RequestError
from ardiff.serving.guard import Guard
from ardiff.serving.jobs import Job
from ardiff.serving.keys import ANONYMOUS, ApiKeys
from ardiff.serving.metrics import PrometheusRecorder, Recorder
from ardiff.serving.replica import Replica
from ardiff.serving.requests import document_body, read_request, validation_error
from ardiff.serving.responses import SECURITY_HEADERS, error_response, file_response, first_chunk, stream_response
from ardiff.serving.schemas import (
    DeletedVideo,
    ErrorResponse,
    Health,
    ModelList,
    Video,
    VideoBase,
    VideoList,
    to_model,
    to_response,
)

_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
_STATUS_DESCRIPTIONS = {
    400: "The body cannot be read.",
    401: "The API key is missing or wrong.",
    403: "Without API keys only this machine is served.",
    404: "There is no such video.",
    409: "There is no video, or not yet.",
    410: "The video has expired.",
    413: "The body is too large.",
    415: "The body is of another type.",
    416: "The range is outside the video.",
    422: "A value is not valid.",
    429: "Too many requests, unfinished videos or open streams; see Retry-After.",
    500: "The generation failed.",
    503: "The service is overloaded or its storage is unavailable; see Retry-After.",
    504: "The video was not ready before its deadline.",
}
_VIDEO_RESPONSE: dict[int | str, dict[str, Any]] = {
    200: {"description": "The video.", "content": {"video/mp4": {}, "video/webm": {}}}
}


def build_app(replica: Replica, recorder: PrometheusRecorder) -> FastAPI:
    """The application of one replica. It starts the replica, and stops it at its own end."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await replica.start()
        yield
        await replica.stop()

    app = FastAPI(
        title="ardiff",
        version="1",
        description="Videos by asynchronous auto-regressive diffusion: as jobs, or streamed while they are generated.",
        docs_url=None,  # FastAPI's own pages load scripts from other hosts
        redoc_url=None,
        lifespan=lifespan,
    )
    _add_error_handlers(app, replica.metrics)
    _add_page(app)
    _add_operations(app, replica, recorder)
    _add_requests(app, replica)
    _add_videos(app, replica)
    app.add_middleware(Guard, config=replica.config, metrics=replica.metrics)
    return app


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Error responses of an operation for the OpenAPI document."""
    common = (401, 403, 422, 503)
    return {
        status: {"model": ErrorResponse, "description": _STATUS_DESCRIPTIONS[status]}
        for status in sorted({*statuses, *common})
    }


def _add_error_handlers(app: FastAPI, metrics: Recorder) -> None:
    @app.exception_handler(RequestError)
    async def request_error(request: Request, error: RequestError) -> Response:
        metrics.record("ardiff_errors", 1, kind=error.kind)
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid_request(request: Request, error: RequestValidationError) -> Response:
        return await request_error(request, validation_error(error.errors()))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        response = error_response(RequestError(error.status_code, "not_found", str(error.detail)))
        response.headers.update(error.headers or {})
        return response


def _add_page(app: FastAPI) -> None:
    folder = resources.files("ardiff.serving") / "page"

    def add(path: str, content: bytes, media_type: str) -> None:
        @app.get(path, include_in_schema=False)
        async def page() -> Response:
            return Response(content, media_type=media_type, headers=SECURITY_HEADERS | {"Cache-Control": "no-cache"})

    for path, (name, media_type) in _PAGE.items():
        add(path, (folder / name).read_bytes(), media_type)


def _add_operations(app: FastAPI, replica: Replica, recorder: PrometheusRecorder) -> None:
    Owner = Annotated[str, Depends(_authenticate(replica.keys))]

    @app.get("/healthz", responses={503: {"model": Health, "description": "The replica does not work."}})
    async def health(response: Response) -> Health:
        """Whether this replica works. It is degraded while storage is unavailable: running streams continue."""
        available = replica.storage.available
        if not replica.healthy:
            response.status_code = 503
        return Health(
            status="ok" if available and replica.healthy else "degraded",
            storage="ok" if available else "unavailable",
            replica=replica.name,
            running=len(replica.running),
            waiting=replica.queue.waiting,
        )

    @app.get("/metrics", response_class=Response, responses=_errors())
    async def metrics(owner: Owner) -> Response:
        """Metrics of this replica in the Prometheus format."""
        return Response(recorder.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", responses=_errors())
    async def models(owner: Owner) -> ModelList:
        """The models, what they can sample, and the limits of the service."""
        return ModelList(data=[to_model(runner, replica.config) for runner in replica.models.values()])


def _add_requests(app: FastAPI, replica: Replica) -> None:
    """The two operations that request a video."""
    Owner = Annotated[str, Depends(_authenticate(replica.keys))]
    body = document_body(replica.config.limits)

    @app.post(
        "/v1/videos",
        status_code=202,
        response_model=Video,
        openapi_extra=body,
        responses=_errors(400, 413, 415, 429),
    )
    async def create(request: Request, response: Response, owner: Owner) -> VideoBase:
        """Requests a video. Responds at once with its id."""
        record = await replica.admission.queue_job(owner, *await read_request(request))
        response.headers["Location"] = f"/v1/videos/{record.id}"
        return to_response(record)

    @app.post(
        "/v1/videos:stream",
        response_class=StreamingResponse,
        openapi_extra=body,
        responses=_errors(400, 409, 413, 415, 429, 500, 504) | _VIDEO_RESPONSE,
    )
    async def create_and_stream(request: Request, owner: Owner) -> Response:
        """Requests a video and sends it while it is generated. Closing the connection cancels it."""
        video_request, upload = await read_request(request)
        with contextlib.ExitStack() as until_closed:
            until_closed.enter_context(replica.streams.open(owner))
            job = await replica.admission.start_stream(owner, video_request, upload)
            until_closed.callback(_cancel_unfinished, job)
            chunks = job.log.follow()
            first = await first_chunk(request, chunks)
            headers = {"X-Video-Id": job.record.id, "Location": f"/v1/videos/{job.record.id}"}
            return stream_response(first, chunks, job.record, until_closed.pop_all(), headers)


def _cancel_unfinished(job: Job) -> None:
    if not job.log.ended:
        job.stop(JobError("cancelled", "The client closed the connection."))


def _add_videos(app: FastAPI, replica: Replica) -> None:
    """The operations on a key's videos."""
    Owner = Annotated[str, Depends(_authenticate(replica.keys))]

    @app.get("/v1/videos", responses=_errors())
    async def list_videos(
        owner: Owner,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[str | None, Query(max_length=64, description="Continue after this video.")] = None,
    ) -> VideoList:
        """The key's videos, newest first."""
        records, has_more = await replica.videos.newest(owner, limit, after)
        return VideoList(data=[to_response(record) for record in records], has_more=has_more)

    @app.get("/v1/videos/{video_id}", response_model=Video, responses=_errors(404))
    async def find(video_id: str, owner: Owner) -> VideoBase:
        """The state of a video."""
        return to_response(await replica.videos.find(owner, video_id))

    @app.delete("/v1/videos/{video_id}", response_model=Video | DeletedVideo, responses=_errors(404))
    async def cancel(video_id: str, owner: Owner) -> VideoBase | DeletedVideo:
        """Cancels a video before its next iteration. Deletes a video that has ended."""
        record = await replica.videos.cancel_or_delete(owner, video_id)
        return DeletedVideo(id=video_id) if record is None else to_response(record)

    @app.get(
        "/v1/videos/{video_id}/content",
        response_class=Response,
        responses=_errors(404, 409, 410, 416) | _VIDEO_RESPONSE | {206: {"description": "A range of bytes."}},
    )
    async def content(video_id: str, request: Request, owner: Owner) -> Response:
        """The finished video as a file, or the requested range of its bytes."""
        record, video = await replica.videos.content(owner, video_id)
        return file_response(record, video, request.headers.get("range"))

    @app.get(
        "/v1/videos/{video_id}/stream",
        response_class=StreamingResponse,
        responses=_errors(404, 409, 410, 429, 500, 504) | _VIDEO_RESPONSE,
    )
    async def stream(video_id: str, request: Request, owner: Owner) -> Response:
        """The video from its beginning while it is generated. Closing the connection does not affect the job."""
        with contextlib.ExitStack() as until_closed:
            until_closed.enter_context(replica.streams.open(owner))
            await replica.videos.find(owner, video_id)
            chunks = replica.streams.follow(owner, video_id)
            first = await first_chunk(request, chunks)
            record = await replica.videos.find(owner, video_id)
            return stream_response(first, chunks, record, until_closed.pop_all())


def _authenticate(keys: ApiKeys) -> Callable[[Request], Awaitable[str]]:
    async def authenticate(request: Request) -> str:
        """The owner of the request's key. Raises RequestError 401."""
        if not keys.required:
            return ANONYMOUS
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        owner = keys.owner_of(key.strip()) if scheme.lower() == "bearer" else None
        if owner is None:
            raise RequestError(401, "unauthorized", "Give a valid API key: `Authorization: Bearer KEY`.")
        return owner

    return authenticate
