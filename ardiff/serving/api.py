"""The HTTP API, shaped like the video APIs in use, and documented by ``/openapi.json``.

This module must not postpone the evaluation of annotations: FastAPI reads them.
"""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import resources
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Header, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match, Route

from ardiff.data.storage import read_bytes
from ardiff.errors import DecodeError
from ardiff.serving.errors import JobError, RequestError
from ardiff.serving.guard import Guard
from ardiff.serving.jobs import Job
from ardiff.serving.keys import ANONYMOUS, ApiKeys
from ardiff.serving.metrics import PrometheusRecorder, Recorder
from ardiff.serving.previews import PREVIEWS
from ardiff.serving.records import ID_PATTERN
from ardiff.serving.replica import Replica
from ardiff.serving.requests import (
    check_extensible,
    document_body,
    document_change,
    document_extension,
    extension_of,
    read_change,
    read_extension,
    read_request,
    validation_error,
)
from ardiff.serving.responses import (
    SECURITY_HEADERS,
    check_streamable,
    error_response,
    file_response,
    first_chunk,
    parse_stream_tag,
    stream_head,
    stream_response,
)
from ardiff.serving.schemas import (
    Change,
    ChangeBase,
    DeletedVideo,
    ErrorResponse,
    Health,
    Model,
    ModelList,
    Video,
    VideoBase,
    VideoList,
    to_change,
    to_list,
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
    410: "The video has expired, or its file is missing or damaged.",
    408: "The body did not arrive in time.",
    412: "The video began again: If-Match names its earlier stream.",
    413: "The body is too large.",
    415: "The body is of another type.",
    416: "The range is outside the video.",
    422: "A value is not valid.",
    431: "The headers are too large.",
    429: "Too many requests, unfinished videos or open streams; see Retry-After.",
    500: "The generation failed.",
    503: "The service is overloaded or its database or storage is unavailable; see Retry-After.",
    505: "The client's HTTP/1.0 cannot receive a stream.",
    504: "The video was not ready before its deadline.",
}
IdempotencyKey = Annotated[
    str | None, Header(min_length=1, max_length=255, description="Repeats of a request get the first one's video.")
]
_VIDEO_RESPONSE: dict[int | str, dict[str, Any]] = {
    200: {"description": "The video.", "content": {"video/mp4": {}, "video/webm": {}}}
}
_CONTENT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The content.",
        "content": {t: {} for t in ("video/mp4", "video/webm", *(picture for picture, _ in PREVIEWS.values()))},
    },
    206: {"description": "A range of bytes."},
    304: {"description": "The client has it already (If-None-Match)."},
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
    _add_head(app)
    app.add_middleware(Guard, config=replica.config, metrics=replica.metrics)
    if replica.config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=replica.config.cors_origins,
            allow_methods=["GET", "HEAD", "POST", "PATCH", "DELETE"],
            allow_headers=[
                "Authorization",
                "Content-Type",
                "Idempotency-Key",
                "If-Match",
                "If-None-Match",
                "If-Range",
                "Range",
            ],
            expose_headers=["Accept-Ranges", "Content-Range", "ETag", "Location", "Retry-After", "X-Video-Id"],
        )
    return app


def _add_head(app: FastAPI) -> None:
    """HEAD for all that GET offers. The server leaves out the body."""
    for route in [route for route in app.routes if isinstance(route, APIRoute) and route.methods == {"GET"}]:
        app.add_api_route(
            route.path,
            route.endpoint,
            methods=["HEAD"],
            response_model=route.response_model,
            response_class=route.response_class,
            include_in_schema=False,
        )


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Error responses of an operation for the OpenAPI document."""
    common = (401, 403, 422, 431, 503)
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
        if error.status_code != 405:
            return error_response(RequestError(error.status_code, "not_found", str(error.detail)))
        matching = [route for route in app.routes if route.matches(request.scope)[0] is not Match.NONE]
        methods = {method for route in matching if isinstance(route, Route) for method in route.methods or ()}
        message = f"{request.method[:16]} is not offered here: use {', '.join(sorted(methods))}."
        return error_response(
            RequestError(405, "method_not_allowed", message, headers={"Allow": ", ".join(sorted(methods))})
        )


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
        """Whether this replica works. It is degraded during an outage of database or storage: streams continue."""
        database, storage = replica.stores.jobs.available, replica.stores.files.available
        if not replica.healthy:
            response.status_code = 503
        return Health(
            status="ok" if database and storage and replica.healthy else "degraded",
            database="ok" if database else "unavailable",
            storage="ok" if storage else "unavailable",
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

    @app.get("/v1/models/{model}", responses=_errors(404))
    async def model(model: str, owner: Owner) -> Model:
        """A model."""
        if model not in replica.models:
            raise RequestError(404, "not_found", f"There is no model '{model[:64]}': see /v1/models.")
        return to_model(replica.models[model], replica.config)


def _add_requests(app: FastAPI, replica: Replica) -> None:
    """The two operations that request a video."""
    Owner = Annotated[str, Depends(_authenticate(replica.keys))]
    body = document_body(replica.config.limits)

    @app.post(
        "/v1/videos",
        status_code=202,
        response_model=Video,
        openapi_extra=body,
        responses=_errors(400, 408, 409, 413, 415, 429),
    )
    async def create(
        request: Request, response: Response, owner: Owner, idempotency_key: IdempotencyKey = None
    ) -> VideoBase:
        """Requests a video. Responds at once with its id."""
        record = await replica.admission.queue_job(owner, *await read_request(request), idempotency_key)
        response.headers["Location"] = f"/v1/videos/{record.id}"
        return to_response(record)

    @app.post(
        "/v1/videos/extensions",
        status_code=202,
        response_model=Video,
        openapi_extra=document_extension(),
        responses=_errors(400, 404, 408, 409, 410, 413, 415, 429),
    )
    async def extend(
        request: Request, response: Response, owner: Owner, idempotency_key: IdempotencyKey = None
    ) -> VideoBase:
        """Requests a longer version of a completed video: its frames, and new ones that continue it."""
        extension, upload = await read_extension(request)
        source = None
        if extension.video is not None:
            source, video = await replica.videos.content(owner, extension.video.id)
            check_extensible(source, replica.config.limits)
            upload = await replica.stores.files.call_timed(read_bytes, video.uri)
        added = extension_of(source, extension)
        record = await replica.admission.queue_job(owner, added, upload, idempotency_key, extends=True)
        response.headers["Location"] = f"/v1/videos/{record.id}"
        return to_response(record)

    for path in ("/v1/videos/edits", "/v1/videos/characters", "/v1/videos/{video_id}/remix"):
        app.post(path, include_in_schema=False)(_not_offered)

    @app.post(
        "/v1/videos:stream",
        response_class=StreamingResponse,
        openapi_extra=body,
        responses=_errors(400, 408, 409, 413, 415, 429, 500, 504, 505) | _VIDEO_RESPONSE,
    )
    async def create_and_stream(request: Request, owner: Owner) -> Response:
        """Requests a video and sends it while it is generated. Closing the connection cancels it."""
        check_streamable(request)
        video_request, upload = await read_request(request)
        with contextlib.ExitStack() as until_closed:
            until_closed.enter_context(replica.streams.open(owner))
            job = await replica.admission.start_stream(owner, video_request, upload)
            until_closed.callback(_cancel_unfinished, job)
            chunks = job.log.follow()
            first = await first_chunk(request, chunks)
            headers = {"X-Video-Id": job.record.id, "Location": f"/v1/videos/{job.record.id}"}
            return stream_response(first, chunks, job.record, until_closed.pop_all(), headers)


async def _not_offered(request: Request) -> Response:
    """What the API shape has, and this service has not."""
    message = "This service does not change videos: request a new one, or POST /v1/videos/extensions to continue one."
    raise RequestError(400, "not_supported", message)


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
        after: Annotated[str | None, Query(pattern=ID_PATTERN, description="Continue after this video.")] = None,
        order: Annotated[Literal["asc", "desc"], Query(description="By creation: desc is newest first.")] = "desc",
    ) -> VideoList:
        """A page of the key's videos."""
        return to_list(*await replica.videos.page(owner, limit, after, newest_first=order == "desc"))

    @app.get("/v1/videos/{video_id}", response_model=Video, responses=_errors(404))
    async def find(video_id: str, owner: Owner) -> VideoBase:
        """The state of a video."""
        return to_response(await replica.videos.find(owner, video_id))

    @app.patch(
        "/v1/videos/{video_id}",
        response_model=Change,
        openapi_extra=document_change(),
        responses=_errors(400, 404, 408, 409, 413, 415),
    )
    async def change(video_id: str, request: Request, owner: Owner) -> ChangeBase:
        """Changes class, prompt or guidance of an unfinished video from the first frame that has not started."""
        requested = await read_change(request)
        values = await replica.admission.resolve_change(await replica.videos.find(owner, video_id), requested)
        return to_change(*await replica.videos.change(owner, video_id, values))

    @app.post("/v1/videos/{video_id}/cancel", response_model=Video, responses=_errors(404))
    async def cancel(video_id: str, owner: Owner) -> VideoBase:
        """Cancels a video before its next iteration. One that has ended stays as it is."""
        return to_response(await replica.videos.cancel(owner, video_id))

    @app.delete("/v1/videos/{video_id}", responses=_errors(404, 409))
    async def delete(video_id: str, owner: Owner) -> DeletedVideo:
        """Deletes a video, after cancelling it if it has not ended. It may be repeated."""
        await replica.videos.delete(owner, video_id)
        return DeletedVideo(id=video_id)

    @app.get(
        "/v1/videos/{video_id}/content",
        response_class=Response,
        responses=_errors(404, 409, 410, 416) | _CONTENT_RESPONSES,
    )
    async def content(
        video_id: str, request: Request, owner: Owner, variant: Literal["video", "thumbnail", "spritesheet"] = "video"
    ) -> Response:
        """The finished video as a file, or the requested range of its bytes; or pictures of it."""
        record, video = await replica.videos.content(owner, video_id)
        if variant == "video":
            return await file_response(request, record, video, replica.stores.files)
        media_type, draw = PREVIEWS[variant]
        try:
            picture = await replica.stores.files.call(draw, record, video)
        except DecodeError as error:
            raise RequestError(410, "damaged", "The file of the video is damaged: request the video again.") from error
        return Response(picture, media_type=media_type, headers=SECURITY_HEADERS)

    @app.get(
        "/v1/videos/{video_id}/hls.m3u8",
        response_class=Response,
        responses=_errors(400, 404, 409, 410) | {200: {"content": {"application/vnd.apple.mpegurl": {}}}},
    )
    async def hls_playlist(video_id: str, owner: Owner) -> Response:
        """The HLS playlist of the video, also while it is generated. Its segments are below ``hls/``."""
        playlist, final = await replica.hls.playlist(owner, video_id)
        headers = SECURITY_HEADERS | {"Cache-Control": "private, max-age=3600" if final else "no-store"}
        return Response(playlist, media_type="application/vnd.apple.mpegurl", headers=headers)

    @app.get("/v1/videos/{video_id}/hls/init.mp4", include_in_schema=False)
    async def hls_header(video_id: str, owner: Owner) -> Response:
        data = await replica.hls.segment(owner, video_id, None)
        return Response(data, media_type="video/mp4", headers=SECURITY_HEADERS)

    @app.get("/v1/videos/{video_id}/hls/{index}.m4s", include_in_schema=False)
    async def hls_segment(video_id: str, index: Annotated[int, Path(ge=0, le=10**6)], owner: Owner) -> Response:
        data = await replica.hls.segment(owner, video_id, index)
        return Response(data, media_type="video/iso.segment", headers=SECURITY_HEADERS)

    @app.get(
        "/v1/videos/{video_id}/stream",
        response_class=StreamingResponse,
        responses=_errors(404, 409, 410, 412, 429, 500, 504, 505) | _VIDEO_RESPONSE,
    )
    async def stream(
        video_id: str,
        request: Request,
        owner: Owner,
        offset: Annotated[int, Query(ge=0, description="Bytes of the stream to leave out: to continue one.")] = 0,
        if_match: Annotated[str | None, Header(description="The ETag of the stream that is continued.")] = None,
    ) -> Response:
        """The video while it is generated. Closing the connection does not affect the job."""
        if request.method == "HEAD":
            return stream_head(await replica.videos.find(owner, video_id))
        check_streamable(request)
        with contextlib.ExitStack() as until_closed:
            until_closed.enter_context(replica.streams.open(owner))
            chunks = replica.streams.follow(owner, video_id, offset, parse_stream_tag(if_match))
            first = await first_chunk(request, chunks)
            job = replica.running.get(video_id, owner)
            record = job.record if job is not None else await replica.videos.find(owner, video_id)
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
