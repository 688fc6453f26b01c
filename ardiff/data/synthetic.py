"""A small procedural data set: coloured shapes that bounce in a square, one class per shape.

Every video is a pure function of (seed, split, index) in closed form, so any frame of any length can be drawn alone.
"""

from dataclasses import dataclass

import numpy as np

from ardiff.data import storage
from ardiff.data.encode import encode_video
from ardiff.data.manifest import Split, VideoRecord
from ardiff.randomness import numpy_generator

CLASSES = ("ring", "square", "triangle", "plus")
COLOURS = np.array(
    [
        [0.90, 0.20, 0.20],
        [0.95, 0.65, 0.15],
        [0.85, 0.85, 0.25],
        [0.25, 0.75, 0.35],
        [0.25, 0.45, 0.95],
        [0.75, 0.35, 0.85],
    ]
)
BACKGROUND = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticConfig:
    """Sizes of the procedural data set."""

    num_train: int = 1024
    """Training videos."""
    num_test: int = 256
    """Held-out videos."""
    num_frames: int = 48
    """Frames of a video."""
    num_long: int = 24
    """Training videos that have ``long_frames`` frames instead."""
    long_frames: int = 200
    """Frames of a long video."""
    resolution: int = 32
    """Height and width in pixels."""
    radius: float = 7.0
    """Half the size of a shape in pixels."""
    fps: float = 8.0
    """Frames per second of the files."""
    crf: int = 8
    """x264 quality; smaller is better. Brightness keeps more than 40 dB at the default. Colour does not at any value:
    4:2:0 video, the only kind that every browser plays, keeps about 32 dB of these small saturated shapes."""
    seed: int = 0
    """Seed of all videos."""

    def __post_init__(self) -> None:
        if min(self.num_train, self.num_test, self.num_frames, self.long_frames) < 1 or self.num_long < 0:
            raise ValueError("num_train, num_test, num_frames and long_frames must be at least 1, num_long 0 or more")
        if self.resolution % 2 or not 1 <= 2 * self.radius < self.resolution:
            raise ValueError("resolution must be even and hold a shape of twice the radius")

    def length(self, index: int, split: Split) -> int:
        """Frames of video ``index``: the first ``num_long`` training videos are the long ones."""
        return self.long_frames if split == "train" and index < self.num_long else self.num_frames


def render_video(config: SyntheticConfig, index: int, split: Split) -> np.ndarray:
    """Video ``index`` of ``split``, uint8 ``(F, H, W, 3)``; its class is ``index % 4``."""
    generator = numpy_generator("synthetic", config.seed, split, index)
    colour = COLOURS[generator.integers(len(COLOURS))]
    speed, angle = generator.uniform(1.0, 2.0), generator.uniform(0.0, 2.0 * np.pi)
    velocity = speed * np.array([np.sin(angle), np.cos(angle)])
    room = config.resolution - 2 * config.radius
    phase = generator.uniform(0.0, 2.0 * room, size=2)
    time = np.arange(config.length(index, split))[:, None]
    travelled = (phase + velocity * time) % (2.0 * room)
    centre = config.radius + room - np.abs(travelled - room)  # (F, 2), a triangle wave between the walls
    pixel = np.arange(config.resolution) + 0.5
    y = pixel[None, :, None] - centre[:, 0, None, None]
    x = pixel[None, None, :] - centre[:, 1, None, None]
    cover = np.clip(0.5 - signed_distance(CLASSES[index % len(CLASSES)], y, x, config.radius), 0.0, 1.0)[..., None]
    return np.round(255.0 * (cover * colour + (1.0 - cover) * BACKGROUND)).astype(np.uint8)


def signed_distance(shape: str, y: np.ndarray, x: np.ndarray, radius: float | np.ndarray) -> np.ndarray:
    """Distance in pixels to the edge of ``shape`` centred at the origin, negative inside; y points down."""
    match shape:
        case "ring":
            return np.abs(np.hypot(x, y) - 0.72 * radius) - 0.26 * radius
        case "square":
            return np.maximum(np.abs(x), np.abs(y)) - 0.85 * radius
        case "triangle":
            slope = np.abs(x) * (2.0 / np.sqrt(5.0)) - y / np.sqrt(5.0) - 0.42 * radius
            return np.maximum(slope, y - 0.9 * radius)
        case "plus":
            upright = np.maximum(np.abs(x) - 0.3 * radius, np.abs(y) - 0.95 * radius)
            lying = np.maximum(np.abs(y) - 0.3 * radius, np.abs(x) - 0.95 * radius)
            return np.minimum(upright, lying)
        case _:
            raise ValueError(f"unknown shape {shape!r}")


def write_video(config: SyntheticConfig, root: str, index: int, split: Split) -> VideoRecord:
    """Encodes video ``index`` as H.264 to ``root/<split>/<class>/<split>_<index>.mp4`` and returns its record."""
    frames = render_video(config, index, split)
    data = encode_video(frames, config.fps, crf=config.crf)
    label = index % len(CLASSES)
    uri = storage.join(root, split, CLASSES[label], f"{split}_{index:05d}.mp4")
    storage.write_bytes(uri, data)
    size = config.resolution
    return VideoRecord(
        uri, len(data), "h264", size, size, config.fps, len(frames), label, CLASSES[label], split, "ok", ""
    )
