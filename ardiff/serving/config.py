"""What the endpoint accepts, how much of it, and how jobs are kept."""

from dataclasses import dataclass, field

from ardiff.data.encode import VideoCodec
from ardiff.sampling.config import EngineConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestLimits:
    """What one request may ask for; more is refused before any work."""

    num_frames: int = 1024
    """Frames of a video."""
    num_inference_steps: int = 250
    """Sampling steps per frame."""
    guidance_scale: float = 20.0
    """Classifier-free guidance."""
    fps: float = 60.0
    """Frames per second of the file."""
    body_bytes: int = 32 * 2**20
    """Bytes of a request, upload included."""
    upload_frames: int = 64
    """Frames of an uploaded clip."""
    upload_pixels: int = 4096 * 4096
    """Pixels of an uploaded frame."""
    upload_seconds: float = 10.0
    """Seconds that decoding an upload may take, of processor and of wall clock; then its process is killed."""
    upload_memory_bytes: int = 2 * 2**30
    """Address space of the process that decodes an upload."""
    video_bytes: int = 256 * 2**20
    """Bytes of an encoded video; a job that makes more fails."""

    def __post_init__(self) -> None:
        counts = (self.num_frames, self.num_inference_steps, self.body_bytes, self.upload_frames, self.upload_pixels)
        if min(*counts, self.upload_memory_bytes, self.video_bytes) < 1:
            raise ValueError("counts and sizes must be at least 1")
        if min(self.guidance_scale, self.fps, self.upload_seconds) <= 0:
            raise ValueError("guidance_scale, fps and upload_seconds must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceConfig:
    """How a replica serves."""

    storage: str = "runs/serve"
    """Folder of job records and videos that all replicas share, local or s3://."""
    keys: str | None = None
    """File of API keys, local or s3:// (``ardiff api-key`` writes its entries); without one, only this machine is
    served, and needs none."""
    keys_seconds: float = 5.0
    """Between two looks at the file of keys: a key that is removed works no longer than that. A file that cannot be
    read, or has an entry that is not valid, changes nothing, and the log says so."""
    allow_anonymous: bool = False
    """Without keys, answer under names other than this machine's own too. Anyone who reaches the service may use it."""
    requests_per_minute: int = 600
    """Videos that may be asked for in a minute, by one key at one replica."""
    jobs_per_key: int = 64
    """Unfinished jobs of one key, on all replicas together."""
    streams_per_key: int = 64
    """Streams that one key may have open at one replica."""
    max_waiting: int = 64
    """Jobs that may wait for a place, on all replicas together; further ones are refused with 503."""
    job_seconds: float = 3600.0
    """Seconds from a job's start to its deadline, when it fails."""
    keep_seconds: float = 86400.0
    """Seconds that a finished job and its video are kept."""
    poll_seconds: float = 0.5
    """Between two looks at the shared queue and at cancellations."""
    heartbeat_seconds: float = 2.0
    """Between two signs of life for the jobs in work."""
    lease_seconds: float = 15.0
    """Without a sign of life for so long, a job's replica counts as dead and another takes the job over."""
    max_attempts: int = 2
    """Replicas that may die with a job before the job fails."""
    segment_seconds: float = 1.0
    """Between two writes of a running job's progress and new part of the video, which other replicas read."""
    storage_seconds: float = 15.0
    """Seconds that storage may take to answer before the request is refused with 503."""
    drain_seconds: float = 60.0
    """Seconds that a stopping replica goes on with its jobs; what is left then goes back to the queue."""
    codec: VideoCodec = "h264"
    """``h264`` and ``av1`` come as fragmented mp4, ``vp9`` as WebM."""
    crf: int = 18
    """Quality of the videos; smaller is better."""
    fps: float = 8.0
    """Frames per second where a request names none."""
    limits: RequestLimits = field(default_factory=RequestLimits)
    """What one request may ask for."""
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(max_requests=16))
    """Limits and ways of computing of the sampling engine of each model."""

    def __post_init__(self) -> None:
        per_key = (self.requests_per_minute, self.jobs_per_key, self.streams_per_key)
        if min(*per_key, self.max_attempts) < 1 or self.max_waiting < 0:
            raise ValueError("limits of a key and max_attempts must be at least 1, max_waiting at least 0")
        periods = (self.poll_seconds, self.heartbeat_seconds, self.segment_seconds, self.storage_seconds)
        if min(*periods, self.keys_seconds, self.job_seconds, self.keep_seconds) <= 0 or self.drain_seconds < 0:
            raise ValueError("seconds must be positive")
        if self.lease_seconds < 2 * self.heartbeat_seconds:
            raise ValueError("lease_seconds must be at least twice heartbeat_seconds")
        if not 0 < self.fps <= self.limits.fps:
            raise ValueError(f"fps must be above 0 and at most limits.fps ({self.limits.fps})")
