"""Requests and responses of the HTTP API. Their sampling parameters are the fields of :class:`SamplingParams`."""

import json
import typing
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

from ardiff.config import field_documentation
from ardiff.sampling.params import FROM_INPUT, MAX_PROMPT_LENGTH, FrameCondition, SamplingMode, SamplingParams
from ardiff.serving.config import RequestLimits, ServiceConfig
from ardiff.serving.model_runner import ModelRunner
from ardiff.serving.records import JobRecord, Status

MAX_SEED = 2**53 - 1
"""The largest integer that JavaScript represents exactly."""
Seconds = (
    typing.Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]
    | typing.Annotated[str, Field(pattern=r"^[0-9]{1,5}(\.[0-9]{1,6})?$")]
)
"""A duration; other clients send it as text."""


def _sampling_fields(known: type[BaseModel], excluded: Sequence[str] = ()) -> dict[str, Any]:
    """Pydantic fields for those of SamplingParams that ``known`` does not define."""
    return _fields_of(SamplingParams, excluded=[*known.model_fields, *excluded])


def _fields_of(config: type[Any], excluded: Sequence[str] = ()) -> dict[str, Any]:
    """Pydantic fields for those of a dataclass, with their defaults and descriptions."""
    hints, documentation = typing.get_type_hints(config), field_documentation(config)
    return {
        f.name: (
            _field_type(hints[f.name]),
            Field(... if f.default is MISSING else f.default, description=documentation[f.name]),
        )
        for f in fields(config)
        if f.name not in excluded
    }


def _field_type(hint: Any) -> Any:
    """The type of a field in requests and responses: a tuple of dataclasses is a list of objects, in forms as JSON."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is not tuple or not is_dataclass(args[0]):
        return hint
    nested = _fields_of(args[0])  # type: ignore[arg-type]
    model = create_model(
        args[0].__name__,  # type: ignore[union-attr]
        __doc__=args[0].__doc__,
        __config__=ConfigDict(extra="forbid"),
        **nested,
    )
    return Annotated[list[model], BeforeValidator(_parse_json)]  # type: ignore[valid-type]


def _parse_json(value: Any) -> Any:
    """The value of a form's field, which is text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error


class ConditionBase(BaseModel):
    """The fields of a condition that accept more than the sampling parameters."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | None = Field(
        None, max_length=MAX_PROMPT_LENGTH, description="What to show; for a model without text the name of a class."
    )
    class_label: int | str | None = Field(
        None, description="Class index or name; without it a video has no class.", examples=[0]
    )


class RequestBase(ConditionBase):
    """The fields of a request that are not sampling parameters, or accept more than those."""

    model: str | None = Field(None, max_length=128, description="An id of /v1/models; null is the first of them.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Seed of the noise; null draws one.")
    fps: float | None = Field(None, gt=0, allow_inf_nan=False, description="Frames per second of the video file.")
    seconds: Seconds | None = Field(None, description="Length of the video; it replaces num_frames.")


VideoRequest = create_model(
    "VideoRequest",
    __base__=RequestBase,
    __doc__="A video to generate. Unknown fields are rejected.",
    **_sampling_fields(RequestBase, excluded=FROM_INPUT),
)


ChangeRequest = create_model(
    "ChangeRequest",
    __base__=ConditionBase,
    __doc__="What changes from the first frame that has not started; what is missing or null stays as it is.",
    **_fields_of(FrameCondition, excluded=["frame", *ConditionBase.model_fields]),
)


class VideoReference(BaseModel):
    """A video of this service."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(max_length=64)


class ExtensionRequest(BaseModel):
    """A longer version of a video: its frames, and new ones that continue it."""

    model_config = ConfigDict(extra="forbid")

    video: VideoReference | None = Field(description="A completed video of this service, or a file of a form.")
    seconds: Seconds = Field(description="Length of the new part.")
    prompt: str | None = Field(None, max_length=MAX_PROMPT_LENGTH, description="Of the new part; null is the video's.")


class ErrorBody(BaseModel):
    """What went wrong."""

    type: str = Field(description="Kind of error, a stable identifier.")
    code: str = Field(description="The same as type.")
    message: str = Field(description="What is wrong, and what to do.")
    param: str | None = Field(None, description="The invalid field.")


class ErrorResponse(BaseModel):
    """Any response other than success."""

    error: ErrorBody


ChangeStatus = Literal["pending", "applied", "not_applied"]


class ChangeBase(BaseModel):
    """Whether a change is applied."""

    object: Literal["video.change"] = "video.change"
    status: ChangeStatus = Field(description="not_applied: every frame had started, or the video ended before.")
    from_frame: int | None = Field(description="The first frame that has these values, if they are applied.")


Change = create_model(
    "Change",
    __base__=ChangeBase,
    __doc__="A change of an unfinished video. null is a value that it leaves as it was.",
    **_fields_of(FrameCondition, excluded=["frame"]),
)


class VideoBase(BaseModel):
    """The state of a job."""

    id: str
    object: Literal["video"] = "video"
    status: Status
    progress: int = Field(description="Finished frames in percent.")
    frames_done: int
    iterations_done: int = Field(description="Iterations of the AD schedule that are done.")
    iterations: int
    model: str
    prompt: str | None
    fps: float
    seconds: str = Field(description="Length of the video.")
    size: str
    created_at: int = Field(description="Whole seconds since 1970, like all times.")
    started_at: int | None
    first_frame_at: int | None = Field(description="When the first frame was ready.")
    first_frame_seconds: float | None = Field(description="From the request to the first frame.")
    completed_at: int | None
    completed_seconds: float | None = Field(description="From the request to the complete video.")
    expires_at: int | None = Field(description="When the video is removed.")
    error: ErrorBody | None
    media_type: str | None
    bytes: int | None
    frames_sha256: str | None = Field(description="Hash of the frames before encoding, uint8 (F, H, W, 3).")
    changes: list[Change] = Field(  # type: ignore[valid-type]
        description="The changes that were requested, in order. conditions holds those that are applied."
    )


Video = create_model("Video", __base__=VideoBase, __doc__="A job and its video.", **_sampling_fields(VideoBase))


class VideoList(BaseModel):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[Video]  # type: ignore[valid-type]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(BaseModel):
    """A deleted video."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class Model(BaseModel):
    """A model that a request can name."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Always 0, which is not known, for clients that need the field.")
    owned_by: str = "ardiff"
    size: str = Field(description="WIDTHxHEIGHT of its videos in pixels, if a request names no other.")
    sizes: list[str] = Field(description="All sizes of its videos.")
    num_classes: int
    class_names: list[str]
    text: bool = Field(description="Whether it takes prompts.")
    window_frames: int = Field(description="Frames that the model sees at once.")
    modes: list[SamplingMode] = Field(description="Sampling modes of videos longer than window_frames.")
    student: bool = Field(description="Whether it is a student of few sampling steps, which takes no guidance.")
    steps: int = Field(description="Sampling steps per frame of a request that names none.")
    ar_step: int = Field(description="ar_step of a request for window_frames frames that names none.")
    maximum: dict[str, float] = Field(description="Largest value of a field of a request.")
    default_fps: float


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Whether this replica works."""

    status: Literal["ok", "degraded"]
    database: Literal["ok", "unavailable"]
    storage: Literal["ok", "unavailable"]
    replica: str
    running: int
    waiting: int


def maximum_values(limits: RequestLimits) -> dict[str, float]:
    """Largest value of each field of a request that ``limits`` names."""
    return {name: value for name, value in asdict(limits).items() if name in VideoRequest.model_fields}


def to_model(runner: ModelRunner, config: ServiceConfig) -> Model:
    """The entry of a model in /v1/models."""
    maximum = maximum_values(config.limits)
    maximum["num_frames"] = min(maximum["num_frames"], config.engine.max_frames)
    maximum["num_inference_steps"] = min(maximum["num_inference_steps"], runner.info.max_steps)
    defaults = runner.info.with_defaults(SamplingParams(num_frames=runner.info.num_frames))
    return Model(
        id=runner.name,
        created=0,
        size=runner.info.resolution.size,
        sizes=[shape.size for shape in runner.info.shapes],
        num_classes=runner.info.num_classes,
        class_names=list(runner.info.class_names),
        text=runner.info.text,
        window_frames=runner.info.num_frames,
        modes=runner.modes,
        student=runner.info.student is not None,
        steps=defaults.resolved_num_inference_steps,
        ar_step=defaults.resolved_ar_step,
        maximum=maximum,
        default_fps=config.fps,
    )


def to_list(records: Sequence[JobRecord], has_more: bool) -> VideoList:
    """The response for a page of records."""
    data = [to_response(record) for record in records]
    return VideoList(
        data=data,
        first_id=records[0].id if records else None,
        last_id=records[-1].id if records else None,
        has_more=has_more,
    )


def to_response(record: JobRecord) -> VideoBase:
    """The response for a record."""
    completed = record.status == "completed"
    completed_at = record.ended_at if completed else None
    error, kind = None, record.error_type or "internal"
    if record.error is not None:
        error = ErrorBody(type=kind, code=kind, message=record.error, param=None)

    def whole(seconds: float | None) -> int | None:
        return None if seconds is None else int(seconds)

    def since_request(seconds: float | None) -> float | None:
        return None if seconds is None else round(seconds - record.created_at, 3)

    values = {
        **record.params,
        "id": record.id,
        "status": record.status,
        "progress": 100 if completed else min(99, 100 * record.frames_done // record.sampling.num_frames),
        "frames_done": record.frames_done,
        "iterations_done": record.iterations_done,
        "iterations": record.iterations,
        "model": record.model,
        "prompt": record.prompt,
        "fps": record.fps,
        "seconds": f"{record.sampling.num_frames / record.fps:g}",
        "size": record.size,
        "created_at": whole(record.created_at),
        "started_at": whole(record.started_at),
        "first_frame_at": whole(record.first_frame_at),
        "first_frame_seconds": since_request(record.first_frame_at),
        "completed_at": whole(completed_at),
        "completed_seconds": since_request(completed_at),
        "expires_at": whole(record.expires_at),
        "error": error,
        "media_type": record.media_type,
        "bytes": record.video_bytes,
        "frames_sha256": record.frames_sha256,
        "changes": [to_change(record, index) for index in range(len(record.changes))],
    }
    return Video(**values)


def to_change(record: JobRecord, index: int) -> ChangeBase:
    """The response for a change of a record."""
    is_decided = index < len(record.change_frames)
    frame = record.change_frames[index] if is_decided else None
    status: ChangeStatus = "applied" if frame is not None else "pending"
    if frame is None and (is_decided or record.ended):
        status = "not_applied"
    return Change(status=status, from_frame=frame, **record.changes[index])
