"""Height and width of frames: one type from configurations to pixels."""

from __future__ import annotations

from typing import Any, NamedTuple


class Resolution(NamedTuple):
    """Height and width of frames in pixels.

    Configurations and their files write one number for a square, and ``[height, width]`` for another rectangle. A
    square has no second spelling, so equal shapes have equal fingerprints.
    """

    height: int
    width: int

    @classmethod
    def square(cls, side: int) -> Resolution:
        """A square of ``side`` pixels."""
        return cls(side, side)

    @classmethod
    def parse(cls, value: Any) -> Resolution:
        """From one number, a pair, or text such as ``36,64``, as on a command line. Raises ValueError."""
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        try:
            sides = [int(part) if isinstance(part, str) else part for part in parts]
            if len(sides) in (1, 2) and all(side % 1 == 0 and not isinstance(side, bool) for side in sides):
                return cls(int(sides[0]), int(sides[-1]))
        except (TypeError, ValueError):
            pass
        raise ValueError(f"must be one number or [height, width] in pixels, not {value!r}")

    @property
    def size(self) -> str:
        """``WIDTHxHEIGHT``, as APIs of videos write it."""
        return f"{self.width}x{self.height}"

    @property
    def plain(self) -> int | list[int]:
        """As configurations write it: the inverse of :meth:`parse`."""
        return self.height if self.height == self.width else [self.height, self.width]

    @property
    def num_pixels(self) -> int:
        """Pixels of a frame."""
        return self.height * self.width

    @property
    def turned(self) -> Resolution:
        """The shape after a quarter turn."""
        return Resolution(self.width, self.height)

    def covering(self, width: int, height: int) -> tuple[float, int, int]:
        """How a picture is scaled to just cover such a frame: the factor, and its new width and height."""
        scale = max(self.height / height, self.width / width)
        return scale, max(round(width * scale), self.width), max(round(height * scale), self.height)

    def largest_in(self, height: int, width: int) -> Resolution:
        """The largest region of ``height`` x ``width`` pixels with the aspect ratio of this shape."""
        return Resolution(
            min(height, round(width * self.height / self.width)), min(width, round(height * self.width / self.height))
        )

    def __str__(self) -> str:
        """``HEIGHTxWIDTH``."""
        return f"{self.height}x{self.width}"
