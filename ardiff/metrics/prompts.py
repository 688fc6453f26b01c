"""Whether a video of the captioned synthetic set shows what its prompt asks for.

Shapes: F frames.
"""

import numpy as np

from ardiff.data.config import SyntheticConfig
from ardiff.data.synthetic import CLASSES, COLOURS, DIRECTIONS, SIZES, SPEEDS
from ardiff.data.synthetic_captions import COLOUR_NAMES, Attributes, read_caption
from ardiff.metrics.shapes import NO_SHAPE, frame_classes, frame_radius
from ardiff.metrics.tracking import Tracking

PROMPT_MEASURES = (
    "prompt followed",
    "prompt colour",
    "prompt direction",
    "prompt size",
    "prompt speed",
    "shuffled prompt",
)
"""What :func:`prompt_measures` measures."""
SPEED_LIMIT = 1.2
"""Pixels per frame between slow and quick videos."""
LARGE_RADIUS = SyntheticConfig().radius
"""Half the size of a large shape in pixels."""


def expected_class(text: str) -> int:
    """The index in ``CLASSES`` of the shape that a prompt asks for; -1 if it names none."""
    shape = read_caption(text).shape
    return NO_SHAPE if shape is None else CLASSES.index(shape)


def prompt_measures(tracking: Tracking, text: str, other_text: str) -> dict[str, float]:
    """The ``PROMPT_MEASURES`` of one video of at least two frames.

    ``prompt followed`` and ``prompt colour`` are shares of frames: those with the asked shape in the asked colour, and
    those in the asked colour. The others are 1 or 0: whether the video moves in the asked direction, has the asked size
    and moves at the asked speed. What the prompt leaves open counts as followed.

    Args:
        text: The prompt of the video, or its caption.
        other_text: The prompt of another video. ``shuffled prompt`` is the share of frames that follow it, which is
            what a video that ignores its prompt reaches.
    """
    classes, colours = frame_classes(tracking), frame_colours(tracking)
    expected, other = read_caption(text), read_caption(other_text)
    return {
        "prompt followed": _followed(classes, colours, expected),
        "prompt colour": float(_equals(colours, COLOUR_NAMES, expected.colour).mean()),
        "prompt direction": float(expected.direction in (None, direction(tracking))),
        "prompt size": float(expected.size in (None, size(tracking, classes))),
        "prompt speed": float(expected.speed in (None, speed(tracking))),
        "shuffled prompt": _followed(classes, colours, other),
    }


def frame_colours(tracking: Tracking) -> np.ndarray:
    """The index in ``COLOURS`` of the colour that is nearest to each frame's object, int64 ``(F,)``; -1 without one."""
    distance = np.linalg.norm(tracking.colour[:, None] - 255.0 * COLOURS, axis=-1)  # (F, colours)
    return np.where(tracking.one_object, np.nan_to_num(distance, nan=np.inf).argmin(axis=1), -1)


def direction(tracking: Tracking) -> str:
    """The name of the direction that is nearest to the median motion of the object; empty without motion."""
    step = np.abs(np.diff(tracking.centroid, axis=0))
    step = step[np.isfinite(step).all(axis=1)]
    if len(step) == 0:
        return ""
    motion = np.median(step, axis=0)
    return max(DIRECTIONS, key=lambda name: float(motion @ np.array(DIRECTIONS[name])))


def speed(tracking: Tracking) -> str:
    """Whether the object moves slowly or quickly, by the median length of its steps; empty without motion."""
    step = np.linalg.norm(np.diff(tracking.centroid, axis=0), axis=1)
    step = step[np.isfinite(step)]
    slow, quick = SPEEDS
    return "" if len(step) == 0 else slow if np.median(step) < SPEED_LIMIT else quick


def size(tracking: Tracking, classes: np.ndarray) -> str:
    """The name of the size that is nearest to the median radius of the recognised frames; empty without one."""
    radii = frame_radius(tracking, classes)
    radii = radii[np.isfinite(radii)]
    if len(radii) == 0:
        return ""
    return min(SIZES, key=lambda name: abs(float(np.median(radii)) - SIZES[name] * LARGE_RADIUS))


def _followed(classes: np.ndarray, colours: np.ndarray, expected: Attributes) -> float:
    """The share of frames with the asked shape and colour, from the shapes and colours of the frames ``(F,)``."""
    return float((_equals(classes, CLASSES, expected.shape) & _equals(colours, COLOUR_NAMES, expected.colour)).mean())


def _equals(values: np.ndarray, names: tuple[str, ...], expected: str | None) -> np.ndarray:
    """Which values ``(F,)`` are the index of the asked name; all if none is asked for."""
    return np.ones(len(values), dtype=bool) if expected is None else values == names.index(expected)
