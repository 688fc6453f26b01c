"""Protocols: the ways in which scores are computed, and what must be equal before two scores may be compared."""

from dataclasses import dataclass, fields
from typing import Literal

from ardiff.errors import ArdiffError, ConfigError
from ardiff.metrics.preprocess import Range, Resize
from ardiff.metrics.uncertainty import Distance
from ardiff.metrics.weights import NetworkName

VERSION = 1
"""Raised whenever the computation of a score changes its values."""
ProtocolName = Literal["quick", "styleganv", "ardiff-release"]
MetricName = Literal["fvd", "kvd", "fid-img", "fid-vid", "psnr", "ssim", "lpips"]
PAIRED: tuple[MetricName, ...] = ("psnr", "ssim", "lpips")
"""Metrics of videos and their originals, one by one; all others are of two sets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """From the frames of a clip to its features, and from two sets of features to a score."""

    network: NetworkName
    feature: str
    """What is taken from the network, in words."""
    size: int
    """Side in pixels of the squares that the network sees."""
    resize: Resize
    value_range: Range
    pool_frames: Literal[1, 2] = 2
    """See :class:`~ardiff.metrics.networks.i3d.I3D`."""
    reencode: bool = False
    """Both sides pass through lossy MPEG-4 first, as in the authors' scripts."""
    distance: Distance = "frechet"
    ddof: int


def _i3d(resize: Resize, pool_frames: Literal[1, 2], reencode: bool, distance: Distance, ddof: int) -> Recipe:
    return Recipe(
        network="i3d",
        feature=f"400 logits, last pooling over {pool_frames} steps",
        size=224,
        resize=resize,
        value_range="[-1, 1]",
        pool_frames=pool_frames,
        reencode=reencode,
        distance=distance,
        ddof=ddof,
    )


def _inception(resize: Resize, reencode: bool, ddof: int) -> Recipe:
    return Recipe(
        network="inception",
        feature="2048 pooled, every frame",
        size=299,
        resize=resize,
        value_range="(x - 128) / 128",
        reencode=reencode,
        ddof=ddof,
    )


RECIPES: dict[tuple[ProtocolName, MetricName], Recipe] = {
    ("styleganv", "fvd"): _i3d("bilinear", 2, False, "frechet", 0),
    ("styleganv", "kvd"): _i3d("bilinear", 2, False, "kernel", 0),
    ("styleganv", "fid-img"): _inception("tf-bilinear", False, 0),
    ("ardiff-release", "fvd"): _i3d("bicubic-antialias", 1, True, "frechet", 1),
    ("ardiff-release", "kvd"): _i3d("bicubic-antialias", 1, True, "kernel", 1),
    ("ardiff-release", "fid-img"): _inception("bicubic-antialias", True, 1),
    ("ardiff-release", "fid-vid"): Recipe(
        network="resnet3d",
        feature="2048 pooled, mean over segments of 16 frames",
        size=112,
        resize="bicubic-antialias",
        value_range="minus mean RGB",
        reencode=True,
        ddof=1,
    ),
}


def recipe(protocol: ProtocolName, metric: MetricName) -> Recipe:
    """How ``metric`` is computed under ``protocol``. Raises ConfigError if the protocol does not define it."""
    found = RECIPES.get((protocol, metric))
    if found is None:
        others = [name for name, other in RECIPES if other == metric]
        raise ConfigError(f"The protocol {protocol} does not define {metric}: use {' or '.join(others) or 'another'}.")
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """How a score was computed. Scores of different protocols are never tabled together."""

    name: str
    """The protocol, such as ``styleganv``; ``paired`` for metrics of videos and their originals."""
    metric: str
    """The score, such as ``fvd``."""
    network: str
    """Feature network, such as ``i3d``."""
    weights: str
    """sha256 over the network's weights, or the seed that they were drawn from."""
    feature: str
    """What is taken from the network."""
    num_frames: int
    """Frames of a clip."""
    stride: int
    """Distance in source frames between the frames of a real clip."""
    resolution: str
    """Height x width of the compared videos in pixels, before the network's own resizing."""
    resize: str
    """How frames are resized to what the network takes."""
    value_range: str
    """Range of pixel values that the network sees."""
    codec_real: str
    """What the real videos went through."""
    codec_fake: str
    """What the generated videos went through."""
    num_real: int
    """Real clips. The bias of a Frechet distance falls as 1/N, so N belongs to the score."""
    num_fake: int
    """Generated clips."""
    ddof: int
    """Divisor of the covariances is N - ddof."""
    real_split: str
    """Which part of the real data the clips are from, such as ``test``."""
    real_data: str
    """Fingerprint of the real clips: the bytes of their files and where the clips start."""
    fps: float = 0.0
    """Frame rate at which the real clips' frames are counted; 0 for that of their videos."""
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
    """Raises ArdiffError that names the first field in which two protocols differ."""
    for field in fields(Protocol):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if left != right:
            raise ArdiffError(
                f"These scores cannot be compared: '{field.name}' is {left!r} in one protocol and {right!r} in the "
                "other. Compute both under the same protocol."
            )
