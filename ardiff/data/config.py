"""Configurations of storage, clips and the synthetic data set."""

import json
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from ardiff.config import to_dict
from ardiff.resolution import Resolution

MAX_AUTO = 4
"""Most shapes that ``clips.auto_buckets`` chooses. The search tries all combinations."""
STORAGE_VARIABLE = "ARDIFF_STORAGE"
"""Environment variable that carries a :class:`StorageConfig` to the processes of a job."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageConfig:
    """How to reach ``s3://`` URIs. Credentials are never part of a configuration: they come from AWS variables,
    profiles or roles. ``anonymous`` is also for ``gs://``, and ``retry_seconds`` for all storage."""

    endpoint: str = ""
    """URL of an S3 server other than AWS. Empty: ``AWS_ENDPOINT_URL``, or AWS."""
    region: str = ""
    """Region. Empty: ``AWS_REGION``, or the region of the bucket."""
    profile: str = ""
    """Profile of the AWS configuration files that holds the credentials. Empty: ``AWS_PROFILE``."""
    anonymous: bool = False
    """Send unsigned requests, for public buckets."""
    path_style: bool = True
    """Address buckets of ``endpoint`` by path instead of host name. Most servers other than AWS need this."""
    timeout: float = 60.0
    """Seconds without an answer after which a request fails."""
    retry_seconds: float = 120.0
    """Seconds for which a request is retried, with growing pauses, after a transient error: throttling, connection
    reset, time-out, server error."""

    def __post_init__(self) -> None:
        if self.endpoint and not re.fullmatch(r"https?://[^/\s]+/?", self.endpoint):
            raise ValueError(f"endpoint must be a URL such as http://host:9000, got {self.endpoint!r}")
        if self.timeout <= 0 or self.retry_seconds < 0:
            raise ValueError("timeout must be above 0 and retry_seconds 0 or more")

    def environment(self) -> dict[str, str]:
        """Environment variables that apply these settings to a process; none if all settings are defaults."""
        if self == StorageConfig():
            return {}
        standard = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_PROFILE": self.profile,
        }
        return {STORAGE_VARIABLE: json.dumps(asdict(self)), **{k: value for k, value in standard.items() if value}}


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipConfig:
    """The clips that training samples from videos. The model defines the resolution."""

    manifest: str = "runs/data/manifest.parquet"
    """Written by ``ardiff prepare``."""
    num_frames: int = 16
    """Frames per clip."""
    stride: int = 1
    """Distance between two frames of a clip, in frames of the video."""
    fps: float = 0.0
    """Frame rate at which videos are sampled; ``stride`` then counts frames at this rate. 0 takes every frame of the
    file."""
    uniform: Literal["videos", "clips"] = "videos"
    """``videos``: an epoch visits each video once. ``clips``: an epoch visits a video as often as clips fit into it,
    each time in another part of it."""
    crop: Literal["center", "random"] = "center"
    """Position of the crop in videos of another aspect ratio than the model's."""
    buckets: tuple[Resolution, ...] = field(default=(), metadata={"omit_default": True})
    """Further shapes of frames that an AR-VAE learns beside ``vae.resolution``, each [height, width]. A video has the
    shape that is cropped the least, and a batch has one shape."""
    auto_buckets: int = field(default=0, metadata={"omit_default": True})
    """Choose up to so many ``buckets`` from the manifest, those that together crop the videos the least; at most 4."""
    lengths: tuple[int, ...] = field(default=(), metadata={"omit_default": True})
    """Further numbers of frames beside ``num_frames``. A video has the first of them that it is long enough for, and a
    batch has one."""
    lengths_fps: tuple[float, ...] = field(default=(), metadata={"omit_default": True})
    """Frame rates of ``lengths``, one for each. Empty: that of ``fps``."""
    clips_per_visit: int = 1
    """Clips taken from a video each time it is read. More clips decode faster but mix less. Must divide 64."""
    horizontal_flip: bool = False
    """Mirror half of the clips."""
    max_bad_fraction: float = 0.05
    """Share of the videos that may be bad. Each bad video becomes a row of ``errors.parquet`` and is replaced by
    another."""

    def __post_init__(self) -> None:
        if min(self.num_frames, self.stride, *self.lengths) < 1:
            raise ValueError("num_frames, lengths and stride must be at least 1")
        if len(set(self.all_lengths)) <= len(self.lengths):
            raise ValueError(f"num_frames and lengths must be different numbers, got {list(self.all_lengths)}")
        if len(self.lengths_fps) not in (0, len(self.lengths)):
            raise ValueError(f"lengths_fps must be empty or have a rate for each of {len(self.lengths)} lengths")
        if self.clips_per_visit < 1 or 64 % self.clips_per_visit:
            raise ValueError(f"clips_per_visit must divide 64, got {self.clips_per_visit}")
        if min(self.fps, *self.lengths_fps, 0) < 0 or not 0 <= self.max_bad_fraction <= 1:
            raise ValueError("fps and lengths_fps must not be negative, and max_bad_fraction between 0 and 1")
        if not 0 <= self.auto_buckets <= MAX_AUTO:
            raise ValueError(f"auto_buckets must be between 0 and {MAX_AUTO}, got {self.auto_buckets}")
        if self.buckets and self.auto_buckets:
            raise ValueError("give buckets or auto_buckets, not both")

    @property
    def span(self) -> int:
        """Video frames from the first to the last frame of a clip."""
        return (self.num_frames - 1) * self.stride + 1

    @property
    def of_each_length(self) -> "tuple[ClipConfig, ...]":
        """The same clips with ``num_frames``, and with each of ``lengths`` instead; each has one length."""
        pairs = zip(self.lengths, self.lengths_fps or [self.fps] * len(self.lengths), strict=True)
        others = [replace(self, num_frames=frames, fps=fps, lengths=(), lengths_fps=()) for frames, fps in pairs]
        return (replace(self, lengths=(), lengths_fps=()), *others)

    @property
    def all_lengths(self) -> tuple[int, ...]:
        """The numbers of frames that clips have."""
        return (self.num_frames, *self.lengths)

    @property
    def resume_key(self) -> dict[str, Any]:
        """Settings that must stay the same when training resumes: those that decide the pixels and their order.

        The videos themselves are identified by :func:`ardiff.data.manifest.content_of`, not by the manifest's path.
        """
        settings = to_dict(self).items()
        return {name: value for name, value in settings if name not in ("manifest", "max_bad_fraction")}


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticConfig:
    """Sizes of the synthetic data set."""

    num_train: int = 1024
    """Training videos."""
    num_test: int = 256
    """Test videos."""
    num_frames: int = 48
    """Frames per video."""
    num_long: int = 24
    """Training videos that have ``long_frames`` frames instead."""
    long_frames: int = 200
    """Frames per long video."""
    resolution: Resolution = Resolution(32, 32)
    """Height and width in pixels: one number, or [height, width]."""
    radius: float = 7.0
    """Half the size of a shape in pixels."""
    fps: float = 8.0
    """Frame rate of the files."""
    crf: int = 8
    """x264 quality; smaller is better. At the default, brightness keeps more than 40 dB. Colour keeps about 32 dB at
    any value, because browsers only play 4:2:0 video and the shapes are small and saturated."""
    captions: bool = False
    """Draw scenes of two sizes, three directions and two speeds, and describe each video in words."""
    seed: int = 0
    """Seed of all videos."""

    def __post_init__(self) -> None:
        if min(self.num_train, self.num_test, self.num_frames, self.long_frames) < 1 or self.num_long < 0:
            raise ValueError("num_train, num_test, num_frames and long_frames must be at least 1, num_long 0 or more")
        if any(side % 2 for side in self.resolution) or not 1 <= 2 * self.radius < min(self.resolution):
            raise ValueError("resolution must be even and hold a shape of twice the radius")


@dataclass(frozen=True, kw_only=True, slots=True)
class MovingDigitsConfig:
    """Sizes and motion of Moving MNIST. The defaults are the published ones."""

    num_train: int = 10000
    """Training videos."""
    num_test: int = 10000
    """Test videos."""
    num_frames: int = 20
    """Frames per video."""
    digits_per_video: int = 2
    """Digits that move in a video."""
    frame_side: int = 64
    """Height and width of a frame in pixels."""
    digit_side: int = 28
    """Height and width of a digit in pixels. Digits of another size are scaled."""
    speed: float = 0.1
    """Way of a digit from one frame to the next, as a share of ``frame_side - digit_side``."""
    fps: float = 10.0
    """Frame rate of the files."""
    seed: int = 0
    """Seed of all videos."""

    def __post_init__(self) -> None:
        if min(self.num_train, self.num_test, self.num_frames, self.digits_per_video) < 1:
            raise ValueError("num_train, num_test, num_frames and digits_per_video must be at least 1")
        if not 1 <= self.digit_side < self.frame_side or self.frame_side % 2:
            raise ValueError("frame_side must be even and larger than digit_side")
        if not 0.0 < self.speed <= 1.0 or self.fps <= 0:
            raise ValueError("speed must be above 0 and at most 1, fps above 0")
