"""A score's protocol: everything that must be equal before two scores may be compared."""

from dataclasses import dataclass, fields

from ardiff.errors import ArdiffError


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """How a set-to-set score was computed. Scores of different protocols are never tabled together."""

    name: str
    """The score, such as ``random3d-frechet``."""
    extractor: str
    """Feature network with its seed or the sha256 of its weights, such as ``random3d-seed0-v1``."""
    num_frames: int
    """Frames of a clip."""
    stride: int
    """Distance in source frames between the frames of a clip."""
    resolution: int
    """Height and width of the compared videos in pixels."""
    num_real: int
    """Real clips. The bias of a Frechet distance falls as 1/N, so N belongs to the score."""
    num_fake: int
    """Generated clips."""
    ddof: int
    """Divisor of the covariances is N - ddof."""
    real_split: str
    """Where the real clips come from, such as ``test``."""
    codec: str
    """What both sides went through, such as ``lossless`` or ``h264-crf8``."""
    version: int = 1
    """Raised whenever the computation changes its values."""

    def __post_init__(self) -> None:
        if min(self.num_real, self.num_fake, self.num_frames) < 2:
            raise ValueError("num_real, num_fake and num_frames must be at least 2")
        if min(self.stride, self.resolution, self.version) < 1:
            raise ValueError("stride, resolution and version must be at least 1")
        if self.ddof not in (0, 1):
            raise ValueError(f"ddof must be 0 or 1, not {self.ddof}")


def same_protocol_or_raise(a: Protocol, b: Protocol) -> None:
    """Raises ArdiffError that names the first field in which two protocols differ."""
    for field in fields(Protocol):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if left != right:
            raise ArdiffError(
                f"These scores cannot be compared: '{field.name}' is {left!r} in one protocol and {right!r} in the "
                "other. Compute both under the same protocol."
            )
