"""The synthetic data set: coloured shapes that bounce in a square, one class per shape.

Every frame is a closed-form function of (seed, split, index, time).
"""

import numpy as np

from ardiff.data import storage
from ardiff.data.config import SyntheticConfig
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


def video_length(config: SyntheticConfig, index: int, split: Split) -> int:
    """Frames of video ``index``. The first ``num_long`` training videos are the long ones."""
    return config.long_frames if split == "train" and index < config.num_long else config.num_frames


def render_video(config: SyntheticConfig, index: int, split: Split) -> np.ndarray:
    """Video ``index`` of ``split``, uint8 ``(F, H, W, 3)``. Its class is ``index % 4``."""
    centre, colour = trajectory(config, index, split)
    return draw_shape(config, CLASSES[index % len(CLASSES)], centre, colour)


def trajectory(config: SyntheticConfig, index: int, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """The centre of the shape in each frame of a video, y and x in pixels ``(F, 2)``, and its colour ``(3,)``."""
    generator = numpy_generator("synthetic", config.seed, split, index)
    colour = COLOURS[generator.integers(len(COLOURS))]
    speed, angle = generator.uniform(1.0, 2.0), generator.uniform(0.0, 2.0 * np.pi)
    velocity = speed * np.array([np.sin(angle), np.cos(angle)])
    extent = config.resolution - 2 * config.radius  # of the centre's positions
    phase = generator.uniform(0.0, 2.0 * extent, size=2)
    time = np.arange(video_length(config, index, split))[:, None]
    distance = (phase + velocity * time) % (2.0 * extent)
    return config.radius + extent - np.abs(distance - extent), colour  # a triangle wave between the walls


def draw_shape(config: SyntheticConfig, shape: str, centre: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """``shape`` at each ``centre`` ``(F, 2)``, in a ``colour`` ``(3,)`` of 0 to 1, as uint8 ``(F, H, W, 3)``."""
    pixel = np.arange(config.resolution) + 0.5
    y = pixel[None, :, None] - centre[:, 0, None, None]
    x = pixel[None, None, :] - centre[:, 1, None, None]
    cover = np.clip(0.5 - signed_distance(shape, y, x, config.radius), 0.0, 1.0)[..., None]
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
