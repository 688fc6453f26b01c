"""The record of a job: what was requested, how far it is, and how it ended."""

import re
import secrets
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from ardiff.sampling.params import FrameCondition, SamplingParams

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled", "expired"]
ENDED: tuple[Status, ...] = ("completed", "failed", "cancelled", "expired")
ID_PATTERN = "^video_[0-9a-f]{32}$"


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRecord:
    """A job as all replicas see it. Times are in seconds since 1970, those of its end by the database's clock."""

    id: str
    owner: str
    """Name of the API key."""
    kind: Literal["job", "stream"]
    """A ``stream`` ends with the connection that requested it. One that outlives its replica becomes a ``job``."""
    model: str
    params: dict[str, Any]
    """The validated :class:`SamplingParams`, as a dict; its ``conditions`` include the changes that are applied."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """Values that clients have requested while it was unfinished, in order. Only requests write them."""
    change_frames: list[int | None] = field(default_factory=list)
    """For the first of ``changes``, the frame from which each is applied; None if it came too late."""
    prompt: str | None = None
    """The prompt of the request."""
    fps: float
    size: str
    """WIDTHxHEIGHT in pixels."""
    iterations: int
    """Iterations of the AD schedule."""
    created_at: float
    status: Status = "queued"
    frames_done: int = 0
    iterations_done: int = 0
    lease: int = 0
    """Number of the last lease under which a replica ran the job."""
    begun: int = 0
    """Number of the lease under which the video began. Later leases continue it, or begin again."""
    pipeline: str | None = None
    """Fingerprint of the pipeline with which it began."""
    stream_bytes: int = 0
    """Bytes of the stream that are published."""
    crashes: int = 0
    """Replicas that crashed while they ran the job."""
    started_at: float | None = None
    first_frame_at: float | None = None
    ended_at: float | None = None
    expires_at: float | None = None
    error_type: str | None = None
    error: str | None = None
    media_type: str | None = None
    video_bytes: int | None = None
    frames_sha256: str | None = None
    """Hash of the frames before encoding. Equal videos have equal hashes."""
    idempotency: str | None = None
    """Hash of the request's idempotency key."""
    request_hash: str | None = None
    """Hash of the request, if it has an idempotency key."""

    @property
    def sampling(self) -> SamplingParams:
        """The sampling parameters."""
        return SamplingParams.from_dict(self.params)

    @property
    def next_change(self) -> dict[str, Any] | None:
        """The first change that is neither applied nor too late."""
        return next(iter(self.changes[len(self.change_frames) :]), None)

    def with_change(self, frame: int | None) -> "JobRecord":
        """The record with the next change applied from this frame on, or too late."""
        params = self.params
        if frame is not None and self.next_change is not None:
            params = asdict(self.sampling.with_change(FrameCondition(frame=frame, **self.next_change)))
        return replace(self, params=params, change_frames=[*self.change_frames, frame])

    @property
    def ended(self) -> bool:
        """Whether the job has ended, with or without a video."""
        return self.status in ENDED

    @property
    def suffix(self) -> str:
        """File name extension of the video."""
        return "webm" if (self.media_type or "").startswith("video/webm") else "mp4"


def new_id() -> str:
    """An identifier that sorts by time of creation and cannot be guessed."""
    return f"video_{int(time.time() * 1000):012x}{secrets.token_hex(10)}"


def is_id(text: str) -> bool:
    """Whether the text has the form of an identifier."""
    return re.fullmatch(ID_PATTERN, text) is not None
