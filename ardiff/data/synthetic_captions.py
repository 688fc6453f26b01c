"""Captions of the synthetic videos, and what a caption asks for.

The vocabulary is closed, so a caption can be read back into the attributes that it names.
"""

from dataclasses import dataclass

import numpy as np

from ardiff.data.synthetic import CLASSES, DIRECTIONS, SIZES, SPEEDS, Scene, is_held_out

COLOUR_NAMES = ("red", "orange", "yellow", "green", "blue", "purple")
"""Names of ``COLOURS``, in their order."""
WORDINGS = (
    "a {size} {colour} {shape} moves {direction} {speed}",
    "{colour} {shape}, {size}, moving {direction} {speed}",
    "{speed} a {size} {colour} {shape} goes {direction}",
    "a {shape} moves {direction} {speed}, it is {size} and {colour}",
)
"""Sentences that name every attribute."""
SHORT_WORDINGS = ("a {colour} {shape}", "a {colour} {shape} moves {direction}", "a {size} {colour} {shape}")
"""Sentences that leave some attributes open."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attributes:
    """What a caption asks for; None for what it leaves open."""

    shape: str | None
    """One of ``CLASSES``."""
    colour: str | None
    """One of ``COLOUR_NAMES``."""
    size: str | None
    """One of ``SIZES``."""
    direction: str | None
    """One of ``DIRECTIONS``."""
    speed: str | None
    """One of ``SPEEDS``."""


def captions(scene: Scene, generator: np.random.Generator) -> tuple[str, ...]:
    """Three captions of a scene: two different ones that name every attribute, and a short one."""
    names = {
        "shape": scene.shape,
        "colour": COLOUR_NAMES[scene.colour],
        "size": scene.size,
        "direction": scene.direction,
        "speed": scene.speed,
    }
    full = generator.choice(len(WORDINGS), size=2, replace=False)
    wordings = [WORDINGS[full[0]], WORDINGS[full[1]], SHORT_WORDINGS[generator.integers(len(SHORT_WORDINGS))]]
    return tuple(wording.format(**names) for wording in wordings)


def read_caption(caption: str) -> Attributes:
    """The attributes that a caption names."""
    words = caption.replace(",", " ").lower().split()

    def named(names: tuple[str, ...]) -> str | None:
        return next((name for name in names if f" {name} " in f" {' '.join(words)} "), None)

    return Attributes(
        shape=named(CLASSES),
        colour=named(COLOUR_NAMES),
        size=named(tuple(SIZES)),
        direction=named(tuple(DIRECTIONS)),
        speed=named(tuple(SPEEDS)),
    )


def asks_for_held_out(caption: str) -> bool:
    """Whether a caption names a shape in a colour that no training video has."""
    asked = read_caption(caption)
    if asked.shape is None or asked.colour is None:
        return False
    return is_held_out(CLASSES.index(asked.shape), COLOUR_NAMES.index(asked.colour))
