"""Protocols: how a score was computed, and what must be equal before two scores may be compared."""

from dataclasses import dataclass, fields
from typing import Literal

from ardiff.errors import ArdiffError

VERSION = 2
"""Raised whenever the computation of a score changes its values."""
FROM_FILES = "from files"
"""What a protocol of features from files has for what is not known of their videos."""
ProtocolName = Literal["styleganv", "ardiff-release", "jedi", "cd-fvd"]
"""The published protocols. :mod:`ardiff.metrics.sets` has their metrics."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """How a score was computed. Scores of different protocols never share a table."""

    name: str
    """The protocol: a published one, ``quick``, or ``paired`` for paired metrics."""
    metric: str
    """The metric, such as ``fvd``."""
    network: str
    """Feature network, such as ``i3d``."""
    weights: str
    """sha256 over the network's weights, or the name of a random network with its seed."""
    feature: str
    """Which output of the network is the feature."""
    num_frames: int
    """Frames of a clip."""
    stride: int
    """Source frames from one frame of a real clip to the next."""
    resolution: str
    """Height x width of the compared videos in pixels, before the network's own resizing."""
    resize: str
    """How frames are resized to what the network takes."""
    value_range: str
    """Range of pixel values that the network sees."""
    codec_real: str
    """Compression of the real videos."""
    codec_fake: str
    """Compression of the generated videos."""
    num_real: int
    """Real clips. The bias of a Frechet distance falls as 1/N, so scores of another N are not comparable."""
    num_fake: int
    """Generated clips."""
    ddof: int
    """The divisor of the covariances is N - ddof."""
    real_split: str
    """The split of the real clips, such as ``test``; ``folder`` for a folder."""
    real_data: str
    """Fingerprint of the real clips: their pixels and where they start."""
    choice: str = "first by path"
    """How the clips are chosen among the videos of both sides."""
    fit: str = "stretch"
    """How frames become square: ``crop`` or ``stretch``; ``whole`` for pairs of frames of their own size."""
    fps: float = 0.0
    """Frame rate at which real clips are sampled; 0 for the rate of their videos."""
    version: int = VERSION
    """Version of the computation."""

    def __post_init__(self) -> None:
        if min(self.num_real, self.num_fake, self.num_frames) < 2:
            raise ValueError("num_real, num_fake and num_frames must be at least 2")
        if min(self.stride, self.version) < 1:
            raise ValueError("stride and version must be at least 1")
        if self.fps < 0:
            raise ValueError("fps must not be negative")
        if self.ddof not in (0, 1):
            raise ValueError(f"ddof must be 0 or 1, not {self.ddof}")


def same_protocol_or_raise(a: Protocol, b: Protocol) -> None:
    """Raises ArdiffError with the name of the first field in which two protocols differ."""
    for field in fields(Protocol):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if left != right:
            raise ArdiffError(
                f"These scores cannot be compared: '{field.name}' is {left!r} in one protocol and {right!r} in the "
                "other. Compute both under the same protocol."
            )
