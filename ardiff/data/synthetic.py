"""The synthetic data set: coloured shapes that bounce in a rectangle, one class per shape.

Every frame is a closed-form function of (seed, split, index, time). With captions, scenes differ in size, direction and
speed too, :mod:`ardiff.data.synthetic_captions` describes them in words, and one colour of each shape is in no training
video: half of the test videos have it.
"""

from dataclasses import dataclass

import numpy as np

from ardiff.data.config import SyntheticConfig
from ardiff.data.manifest import Split
from ardiff.randomness import numpy_generator
from ardiff.resolution import Resolution

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
SIZES = {"small": 0.8, "large": 1.0}
"""Sizes of captioned scenes, as a share of the configured radius."""
DIRECTIONS = {"left and right": (0.0, 1.0), "up and down": (1.0, 0.0), "diagonally": (0.5**0.5, 0.5**0.5)}
"""Directions of captioned scenes, y and x. A wall turns one around, so it has no sign."""
SPEEDS = {"slowly": (0.6, 0.9), "quickly": (1.5, 2.0)}
"""Speeds of captioned scenes, in pixels per frame."""


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """What a video shows: a shape that moves straight ahead and bounces between the walls."""

    shape: str
    colour: int
    """Index in ``COLOURS``."""
    radius: float
    """Half the size of the shape in pixels."""
    velocity: np.ndarray
    """y and x in pixels per frame, ``(2,)``."""
    phase: np.ndarray
    """Where the shape starts, ``(2,)``: a position on the way from one wall to the other and back, in pixels."""
    extent: np.ndarray
    """Distance in pixels between the outermost positions of the centre, y and x, ``(2,)``."""
    size: str = ""
    """One of ``SIZES``; empty without captions, as are the next two."""
    direction: str = ""
    """One of ``DIRECTIONS``."""
    speed: str = ""
    """One of ``SPEEDS``."""

    def centres(self, num_frames: int) -> np.ndarray:
        """The centre of the shape in each frame, y and x in pixels, ``(F, 2)``."""
        distance = (self.phase + self.velocity * np.arange(num_frames)[:, None]) % (2.0 * self.extent)
        return self.radius + self.extent - np.abs(distance - self.extent)  # a triangle wave between the walls


def draw_scene(config: SyntheticConfig, index: int, split: Split) -> Scene:
    """The scene of video ``index`` of ``split``, whose shape is ``CLASSES[index % 4]``."""
    generator = numpy_generator("synthetic", config.seed, split, index)
    shape = index % len(CLASSES)
    if config.captions:
        return _draw_captioned(config, generator, shape, split == "test" and index // len(CLASSES) % 2 == 0)
    colour = int(generator.integers(len(COLOURS)))
    speed, angle = generator.uniform(1.0, 2.0), generator.uniform(0.0, 2.0 * np.pi)
    velocity = speed * np.array([np.sin(angle), np.cos(angle)])
    extent = np.array(config.resolution) - 2 * config.radius
    return Scene(CLASSES[shape], colour, config.radius, velocity, generator.uniform(0.0, 2.0 * extent), extent)


def is_held_out(shape: int, colour: int) -> bool:
    """Whether a shape in a colour, both by index, is left out of the captioned training videos."""
    return shape == colour


def _draw_captioned(config: SyntheticConfig, generator: np.random.Generator, shape: int, held_out: bool) -> Scene:
    """A scene whose size, direction and speed are of few kinds, which words can tell apart."""
    colours = [colour for colour in range(len(COLOURS)) if is_held_out(shape, colour) == held_out]
    colour = colours[generator.integers(len(colours))]
    size, direction, speed = (
        list(kinds)[generator.integers(len(kinds))] for kinds in (SIZES, DIRECTIONS, SPEEDS)
    )  # fmt: skip
    radius = config.radius * SIZES[size]
    extent = np.array(config.resolution) - 2 * radius
    signs = generator.choice([-1.0, 1.0], size=2)
    velocity = generator.uniform(*SPEEDS[speed]) * signs * np.array(DIRECTIONS[direction])
    phase = generator.uniform(0.0, 2.0 * extent)
    return Scene(CLASSES[shape], colour, radius, velocity, phase, extent, size, direction, speed)


def video_length(config: SyntheticConfig, index: int, split: Split) -> int:
    """Frames of video ``index``. The first ``num_long`` training videos are the long ones."""
    return config.long_frames if split == "train" and index < config.num_long else config.num_frames


def render_video(config: SyntheticConfig, index: int, split: Split) -> np.ndarray:
    """Video ``index`` of ``split``, uint8 ``(F, H, W, 3)``."""
    scene = draw_scene(config, index, split)
    return render_scene(config.resolution, scene, scene.centres(video_length(config, index, split)))


def render_scene(resolution: Resolution, scene: Scene, centre: np.ndarray) -> np.ndarray:
    """The shape of a scene at each ``centre (F, 2)``, uint8 ``(F, H, W, 3)``."""
    rows, columns = (np.arange(side) + 0.5 for side in resolution)
    y = rows[None, :, None] - centre[:, 0, None, None]
    x = columns[None, None, :] - centre[:, 1, None, None]
    cover = np.clip(0.5 - signed_distance(scene.shape, y, x, scene.radius), 0.0, 1.0)[..., None]
    return np.round(255.0 * (cover * COLOURS[scene.colour] + (1.0 - cover) * BACKGROUND)).astype(np.uint8)


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
