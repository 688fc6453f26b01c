"""Changes of the condition while a video is generated."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from ardiff.sampling.params import CONDITION_FIELDS
from ardiff.sampling.request import EncodedPrompt

Encode = Callable[[Mapping[str, Any]], Mapping[str, EncodedPrompt]]
"""Encodes the texts among changes."""
Apply = Callable[[Mapping[str, Any], Mapping[str, EncodedPrompt]], int | None]
"""Applies changes to a stream. Returns the first frame that has them, or None if there is no such frame left."""


class LiveControl:
    """Changes prompt, class or guidance of the videos that ``pipeline.stream(..., control=...)`` generates.

    Any thread may call :meth:`set`, also the one that reads the stream. A control is for one stream.

    >>> control = LiveControl()
    >>> for frame in pipeline.stream(prompt="a red ring moves right", num_frames=4096, control=control):
    ...     if clicked():
    ...         control.set(prompt="a red ring moves up")
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._state: Literal["new", "streaming", "ended"] = "new"
        self._early: dict[str, Any] = {}
        self._encode: Encode | None = None
        self._apply: Apply | None = None
        self._in_iteration, self._waiting = False, 0

    def set(self, **changes: Any) -> int | None:
        """Replaces values from the first frame that has not started on.

        Args:
            changes: ``prompt``, ``class_label`` or ``guidance_scale``; see
                :class:`~ardiff.sampling.params.FrameCondition`.

        Returns:
            The index of that frame: 0 before the stream starts; None if every frame has started, and nothing changes.

        Raises:
            TypeError: Another name, or no value.
            InvalidParamError: A value is not valid for the model, or guidance is off in this stream.
            EngineLimitError: The prompt does not fit into memory.
        """
        changes = {name: value for name, value in changes.items() if value is not None}
        if not changes or not changes.keys() <= set(CONDITION_FIELDS):
            raise TypeError(
                f"set takes at least one of {', '.join(CONDITION_FIELDS)}, got {', '.join(changes) or 'nothing'}"
            )
        with self._changed:
            if self._state == "new":
                self._early |= changes
                return 0
        prompts = {} if self._encode is None else self._encode(changes)  # while the stream goes on
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._in_iteration)
                return None if self._apply is None else self._apply(changes, prompts)
            finally:
                self._waiting -= 1
                self._changed.notify_all()

    @contextmanager
    def attached(self, start: Callable[[Mapping[str, Any]], tuple[Encode, Apply]]) -> Iterator[None]:
        """Attaches a stream, which ``start`` starts with the changes that were set before.

        Raises:
            ValueError: The control belongs to another stream.
        """
        with self._changed:
            if self._state != "new":
                raise ValueError("a LiveControl is for one stream: create another one")
            self._encode, self._apply = start(self._early)
            self._state = "streaming"
        try:
            yield
        finally:
            with self._changed:
                self._state, self._encode, self._apply = "ended", None, None

    @contextmanager
    def iteration(self) -> Iterator[None]:
        """Keeps changes out during an iteration of the stream. Waiting changes come first."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)
            self._in_iteration = True
        try:
            yield
        finally:
            with self._changed:
                self._in_iteration = False
                self._changed.notify_all()
