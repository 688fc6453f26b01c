"""Configuration of the endpoint: limits of requests and keys, storage, and periods."""

from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

from ardiff.data.encode import VideoCodec
from ardiff.data.filters import FilterMode
from ardiff.data.storage import is_remote
from ardiff.sampling.config import EngineConfig

SQLITE_FILE = "jobs.sqlite"
POSTGRESQL = "postgresql://"


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestLimits:
    """Limits of one request. A request beyond them is rejected before any work.

    A field with the name of a sampling parameter is its largest value.
    """

    num_frames: int = 1024
    """Frames of a video."""
    num_inference_steps: int = 250
    """Sampling steps per frame."""
    guidance_scale: float = 20.0
    """Classifier-free guidance."""
    fps: float = 60.0
    """Frames per second of the file."""
    texts: int = 32
    """Distinct texts of a video: its prompt, its negative prompt, and those of ``conditions``."""
    changes: int = 64
    """Changes (``PATCH``) of an unfinished video, which are stored with it."""
    body_bytes: int = 32 * 2**20
    """Bytes of a request, including its upload."""
    body_seconds: float = 30.0
    """Seconds in which a request must arrive completely."""
    unfinished_bodies: int = 64
    """Requests that may arrive at the same time on a replica. Above it the oldest is rejected."""
    upload_frames: int = 64
    """Frames of an uploaded clip."""
    upload_pixels: int = 4096 * 4096
    """Pixels of an uploaded frame."""
    upload_seconds: float = 10.0
    """Seconds of CPU time and of wall time for decoding an upload; then its process is killed."""
    upload_memory_bytes: int = 2 * 2**30
    """Address space of the process that decodes an upload."""
    video_bytes: int = 256 * 2**20
    """Bytes of an encoded video. A job whose video is larger fails."""

    def __post_init__(self) -> None:
        counts = (self.num_frames, self.num_inference_steps, self.texts, self.upload_frames, self.unfinished_bodies)
        sizes = (self.body_bytes, self.upload_pixels, self.upload_memory_bytes, self.video_bytes)
        if min(*counts, *sizes) < 1 or self.changes < 0:
            raise ValueError("counts and sizes must be at least 1, changes at least 0")
        if min(self.guidance_scale, self.fps, self.upload_seconds, self.body_seconds) <= 0:
            raise ValueError("guidance_scale, fps, upload_seconds and body_seconds must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceConfig:
    """Configuration of a replica."""

    storage: str = "runs/serve"
    """Folder of given frames and videos, local or s3://. All replicas share it."""
    database: str | None = None
    """The database of jobs: a SQLite file, which the replicas of one machine share, or ``postgresql://USER@HOST/NAME``
    for any number of machines. None is ``jobs.sqlite`` in a local ``storage``; with s3:// there is no default."""
    database_password: str | None = None
    """Where the password of PostgreSQL is: ``env:NAME``, an environment variable of the replicas, or a file. It is read
    for each new connection, so it can be changed."""
    keys: str | None = None
    """File of API keys, local or s3://; ``ardiff api-key`` prints its entries. Without it no key is needed, and only
    requests from this machine are served."""
    keys_seconds: float = 5.0
    """Seconds between two reads of the key file. A removed key stops working after this time. If the file cannot be
    read or has an invalid entry, the keys stay as they are, and an error is logged."""
    allow_anonymous: bool = False
    """Serve other machines without keys: anyone who reaches the service can use it."""
    cors_origins: tuple[str, ...] = ()
    """Origins, such as https://videos.example, whose pages may use the service from a browser; ``*`` is all of them."""
    requests_per_minute: int = 600
    """Videos that one key may request per minute, on each replica."""
    jobs_per_key: int = 64
    """Unfinished jobs of one key, on all replicas together."""
    streams_per_key: int = 64
    """Streams that one key may have open on one replica."""
    max_waiting: int = 64
    """Jobs that may wait, on all replicas together. Further ones are rejected with 503."""
    job_seconds: float = 3600.0
    """Seconds that a job may run before it fails."""
    keep_seconds: float = 86400.0
    """Seconds that the record and the video of a finished job are kept."""
    poll_seconds: float = 0.5
    """Seconds between two looks at the shared queue and the cancellations."""
    heartbeat_seconds: float = 2.0
    """Seconds between two heartbeats of a running job."""
    lease_seconds: float = 15.0
    """Seconds without a heartbeat after which a job's replica counts as crashed, and another takes the job over."""
    max_attempts: int = 2
    """Replicas that may crash while they run a job before the job fails."""
    segment_seconds: float = 1.0
    """Seconds between two writes of a running job's progress and video segment, which other replicas read."""
    storage_seconds: float = 15.0
    """Seconds that a request waits for storage or the database before it is rejected with 503."""
    drain_seconds: float = 60.0
    """Seconds that a stopping replica continues its jobs. Then unfinished ones return to the queue."""
    codec: VideoCodec = "h264"
    """``h264`` and ``av1`` are sent as fragmented mp4, ``vp9`` as WebM."""
    crf: int = 18
    """Constant rate factor of the encoder: a smaller value is better quality and more bytes."""
    fps: float = 8.0
    """Frames per second if a request gives none."""
    deinterlace: FilterMode = "off"
    """``auto`` deinterlaces interlaced uploads."""
    tone_map: FilterMode = "off"
    """``auto`` maps HDR uploads, such as clips of many phones, to SDR."""
    limits: RequestLimits = field(default_factory=RequestLimits)
    """Limits of one request."""
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(max_requests=16))
    """The sampling engine of each model: limits and backends."""

    def __post_init__(self) -> None:
        per_key = (self.requests_per_minute, self.jobs_per_key, self.streams_per_key)
        if min(*per_key, self.max_attempts) < 1 or self.max_waiting < 0:
            raise ValueError("limits per key and max_attempts must be at least 1, max_waiting at least 0")
        periods = (self.poll_seconds, self.heartbeat_seconds, self.segment_seconds, self.storage_seconds)
        if min(*periods, self.keys_seconds, self.job_seconds, self.keep_seconds) <= 0 or self.drain_seconds < 0:
            raise ValueError("seconds must be positive, drain_seconds at least 0")
        if self.lease_seconds < 2 * self.heartbeat_seconds:
            raise ValueError("lease_seconds must be at least twice heartbeat_seconds")
        if "*" in self.cors_origins and not self.keys:
            raise ValueError(
                "cors_origins=* lets the pages of all sites use the service: set keys, or name the origins"
            )
        if not 0 < self.fps <= self.limits.fps:
            raise ValueError(f"fps must be above 0 and at most limits.fps ({self.limits.fps})")
        self._check_database()

    @property
    def database_uri(self) -> str:
        """Path of the SQLite file, or the URL of PostgreSQL."""
        return self.database or f"{self.storage.rstrip('/')}/{SQLITE_FILE}"

    @property
    def is_postgresql(self) -> bool:
        """Whether replicas of several machines can share the database."""
        return self.database_uri.startswith(POSTGRESQL)

    def _check_database(self) -> None:
        if self.database is None and is_remote(self.storage):
            raise ValueError(
                f"storage {self.storage} cannot hold the database: set database to postgresql://USER@HOST/NAME, or "
                "to a SQLite file of this machine if all replicas run on it"
            )
        if is_remote(self.database_uri) and not self.is_postgresql:
            raise ValueError("database must be the path of a SQLite file, or postgresql://USER@HOST/NAME")
        if self.is_postgresql:
            check_postgresql(self.database_uri)
        if self.database_password is not None and not self.is_postgresql:
            raise ValueError("database_password is for PostgreSQL only: a SQLite file has none")


def check_postgresql(uri: str) -> None:
    """Raises ValueError unless this is the URL of a PostgreSQL database, without a password."""
    url = urlsplit(uri)
    try:
        is_valid = uri.startswith(POSTGRESQL) and url.port != 0
    except ValueError:  # the port is no number
        is_valid = False
    if not is_valid:
        raise ValueError("database must be postgresql://USER@HOST/NAME or postgresql://USER@HOST:PORT/NAME")
    if url.password is not None or any("password" in key.lower() for key in parse_qs(url.query, True)):
        raise ValueError("database holds a password, which logs show: set database_password=env:NAME, or to a file")
