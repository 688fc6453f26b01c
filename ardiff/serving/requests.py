"""Requests and answers of the HTTP interface, and the check of a request against the model that is to do it."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from ardiff.diffusion.ar_step import smallest_ar_step
from ardiff.errors import ArdiffError
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.sampling.cost import sequential_passes
from ardiff.sampling.params import InvalidParamError, SamplingParams
from ardiff.sampling.request import SampleRequest
from ardiff.serving.config import ServiceConfig
from ardiff.serving.records import JobRecord, Status

MAX_SEED = 2**53 - 1  # what JavaScript can name exactly


class RequestError(ArdiffError):
    """An answer other than success: the HTTP status, the kind of error, and which field is meant."""

    def __init__(
        self, status: int, kind: str, message: str, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.retry_after = status, kind, param, retry_after


class VideoRequest(BaseModel):
    """A video to generate. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, max_length=128, description="One of /v1/models; the first of them without.")
    class_label: int | str | None = Field(
        None, description="Class by number or name; null generates without a class.", examples=[0]
    )
    num_frames: int = Field(16, ge=1, description="Frames of the video, given ones included.")
    ar_step: int | None = Field(
        None,
        ge=0,
        description="Difference of timesteps between neighbouring frames: 0 denoises all frames together, "
        "num_inference_steps one after the other. 5, or the nearest valid value, without.",
    )
    num_inference_steps: int = Field(50, ge=1, description="Sampling steps per frame.")
    guidance_scale: float = Field(1.0, ge=0, allow_inf_nan=False, description="Classifier-free guidance; 1 is none.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Equal seeds give equal videos; drawn without.")
    fps: float | None = Field(None, gt=0, allow_inf_nan=False, description="Frames per second of the file.")
    size: str | None = Field(None, max_length=32, description="WIDTHxHEIGHT: that of the model, if given.")
    mode: Literal["window", "rolling"] = Field(
        "window", description="What a frame of a long video sees: a moving window, or all that is remembered."
    )


class ErrorBody(BaseModel):
    """What went wrong."""

    type: str = Field(description="Kind of error, a word that does not change.")
    message: str = Field(description="What is wrong, and what to do.")
    param: str | None = Field(None, description="The field that is meant.")


class ErrorAnswer(BaseModel):
    """An answer other than success."""

    error: ErrorBody


class Video(BaseModel):
    """A job and its video."""

    id: str
    object: Literal["video"] = "video"
    status: Status
    progress: int = Field(description="Share of the frames that are done, in percent.")
    frames_done: int
    num_frames: int
    iterations_done: int = Field(description="Iterations of the schedule that are done.")
    iterations: int
    model: str
    class_label: int | None
    ar_step: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    fps: float
    size: str
    mode: str
    given_frames: int
    created_at: float
    started_at: float | None
    first_frame_at: float | None = Field(description="When the first frame could be sent.")
    completed_at: float | None
    expires_at: float | None = Field(description="When the record and the video are removed.")
    error: ErrorBody | None
    media_type: str | None
    bytes: int | None
    frames_sha256: str | None = Field(description="Hash of the frames before encoding, uint8 (F, H, W, 3).")


class VideoList(BaseModel):
    """Jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[Video]
    has_more: bool


class DeletedVideo(BaseModel):
    """An ended job that was removed with its video."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class Model(BaseModel):
    """A checkpoint that can be asked for."""

    id: str
    object: Literal["model"] = "model"
    size: str
    num_classes: int
    class_names: list[str]
    window_frames: int = Field(description="Frames that the model sees at once.")
    modes: list[str]
    max_frames: int
    max_inference_steps: int
    max_guidance_scale: float
    default_fps: float


class ModelList(BaseModel):
    """All checkpoints."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Whether this replica works."""

    status: Literal["ok", "degraded"]
    storage: Literal["ok", "unreachable"]
    replica: str
    running: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Described:
    """A model as requests are checked against it; its networks are elsewhere."""

    name: str
    pipeline: ARDiffusionPipeline
    check: Callable[[SampleRequest], SampleRequest]
    """Raises what the engine would refuse a request with."""

    @property
    def size(self) -> str:
        """WIDTHxHEIGHT."""
        return f"{self.pipeline.vae.config.resolution}x{self.pipeline.vae.config.resolution}"

    def public(self, config: ServiceConfig) -> Model:
        """What /v1/models says."""
        dit = self.pipeline.dit.config
        rolling = dit.attention_window is not None and dit.positions == "rotary"
        return Model(
            id=self.name,
            size=self.size,
            num_classes=dit.num_classes,
            class_names=self.pipeline.class_names,
            window_frames=dit.num_frames,
            modes=["window", "rolling"] if rolling else ["window"],
            max_frames=min(config.limits.num_frames, config.engine.max_frames),
            max_inference_steps=min(config.limits.num_inference_steps, self.pipeline.diffusion.num_timesteps),
            max_guidance_scale=config.limits.guidance_scale,
            default_fps=config.fps,
        )


def settle(asked: VideoRequest, model: Described, config: ServiceConfig, given: int) -> dict[str, Any]:
    """The complete settings of a request, ``given`` of whose frames were uploaded.

    Raises:
        RequestError: 422 with the field and the reason, before anything is computed.
    """
    limits = config.limits
    for field, value, most in (
        ("num_frames", asked.num_frames, limits.num_frames),
        ("num_inference_steps", asked.num_inference_steps, limits.num_inference_steps),
        ("guidance_scale", asked.guidance_scale, limits.guidance_scale),
        ("fps", asked.fps or 0, limits.fps),
    ):
        if value > most:
            raise invalid(field, f"{field} is {value}: at most {most} here.")
    if asked.size is not None and asked.size != model.size:
        raise invalid("size", f"size is {asked.size[:32]}: the model '{model.name}' makes {model.size} only.")
    if given >= asked.num_frames:
        raise invalid("num_frames", f"{given} given frames leave nothing to generate of {asked.num_frames}.")
    window = model.pipeline.dit.config.num_frames if asked.mode == "window" else None
    smallest = smallest_ar_step(asked.num_frames, asked.num_inference_steps, window)
    ar_step = asked.ar_step
    if ar_step is None:
        ar_step = min(max(5, smallest), asked.num_inference_steps)
    settings = {
        "model": model.name,
        "class_label": _class(asked.class_label, model),
        "num_frames": asked.num_frames,
        "ar_step": ar_step,
        "num_inference_steps": asked.num_inference_steps,
        "guidance_scale": asked.guidance_scale,
        "seed": secrets.randbelow(2**31) if asked.seed is None else asked.seed,
        "fps": config.fps if asked.fps is None else asked.fps,
        "mode": asked.mode,
        "size": model.size,
        "given_frames": given,
    }
    latents = model.pipeline.dit.config
    condition = torch.zeros(1, given, latents.num_tokens, latents.token_dim, device="meta") if given else None
    try:
        model.check(sample_request(settings, condition))
    except (ValueError, ArdiffError) as error:
        param = error.param if isinstance(error, InvalidParamError) else None
        raise invalid(param, str(error)) from error
    return settings


def iterations(settings: dict[str, Any]) -> int:
    """Iterations of the AD schedule."""
    return sequential_passes(_params(settings))


def _params(settings: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**{f.name: settings[f.name] for f in fields(SamplingParams)})


def sample_request(settings: dict[str, Any], condition: torch.Tensor | None) -> SampleRequest:
    """The engine's request, with the latents of given frames ``(1, k, L, D)``."""
    return SampleRequest(videos=(_params(settings),), condition=condition)


def invalid(param: str | None, message: str) -> RequestError:
    """A field that cannot be accepted."""
    return RequestError(422, "invalid_request", message, param)


def public(record: JobRecord) -> Video:
    """What a client is told of a job."""
    record = record.now()
    settings = record.settings
    done = record.status == "completed"
    error = None
    if record.error is not None:
        error = ErrorBody(type=record.error_type or "internal", message=record.error, param=None)
    names = ("model", "class_label", "ar_step", "num_inference_steps", "guidance_scale", "seed", "fps", "mode")
    return Video(
        **{name: settings[name] for name in (*names, "size", "given_frames")},
        id=record.id,
        status=record.status,
        progress=100 if done else min(99, 100 * record.frames_done // record.num_frames),
        frames_done=record.frames_done,
        num_frames=record.num_frames,
        iterations_done=record.iterations_done,
        iterations=record.iterations,
        created_at=record.created_at,
        started_at=record.started_at,
        first_frame_at=record.first_frame_at,
        completed_at=record.ended_at if done else None,
        expires_at=record.expires_at,
        error=error,
        media_type=record.media_type,
        bytes=record.video_bytes,
        frames_sha256=record.frames_sha256,
    )


def _class(asked: int | str | None, model: Described) -> int | None:
    count, names = model.pipeline.dit.config.num_classes, model.pipeline.class_names
    if asked is None:
        return None
    if isinstance(asked, str) and asked in names:
        return names.index(asked)
    if isinstance(asked, str) and asked.isdecimal() and len(asked) < 10:
        asked = int(asked)
    if isinstance(asked, str) or not 0 <= asked < count:
        valid = f"has classes 0..{count - 1}" if count else "has no classes"
        known = f" ({', '.join(names[:50])})" if names and count else ""
        raise invalid("class_label", f"class_label is {str(asked)[:64]}: the model '{model.name}' {valid}{known}.")
    return asked
