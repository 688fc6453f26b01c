"""Filters of videos: deinterlacing with FFmpeg, and which filters a video needs by the warnings of its probe."""

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from fractions import Fraction
from typing import Literal

import av
import av.filter

from ardiff.errors import DecodeError

FilterMode = Literal["off", "auto"]
"""``off``: pictures stay as they are. ``auto``: those of videos that need the filter are filtered."""
REMEDIES = {"interlaced": "deinterlace", "hdr": "tone_map"}
"""The filter, and the setting, for each warning of a probe."""


def filters_for(warnings: Iterable[str], deinterlace: FilterMode, tone_map: FilterMode) -> tuple[str, ...]:
    """The filters for a video with these warnings."""
    modes = {"deinterlace": deinterlace, "tone_map": tone_map}
    return tuple(REMEDIES[name] for name in warnings if modes[REMEDIES[name]] == "auto")


def deinterlaced(
    frames: Iterable[tuple[int, av.VideoFrame]], wanted: Collection[int]
) -> Iterator[tuple[int, av.VideoFrame]]:
    """The frames whose numbers are ``wanted``; those that are interlaced by FFmpeg's filter bwdif, one for one.

    A frame depends on itself and its two neighbours alone, wherever decoding starts: frames that are not interlaced
    stay as they are, and only the first and last of a video may lack a neighbour.

    Args:
        frames: Numbered frames. The first is that before the first wanted one, or 0. One after the last wanted frame is
            read, if there is one.
        wanted: Their numbers.

    Raises:
        DecodeError: The frames change their size.
    """
    needed = {number + shift for number in wanted for shift in (-1, 0, 1)}
    graph: av.filter.Graph | None = None
    pending = deque[tuple[int, av.VideoFrame]]()
    shape, pushed = ("", 0, 0), 0
    for number, frame in frames:
        if number not in needed:
            continue
        if graph is None:
            graph, shape = _bwdif(frame), _shape(frame)
        if _shape(frame) != shape:
            raise DecodeError("its frames change their size", "size changes")
        graph.push(frame)
        pending.append((number, frame))
        pushed += 1
        if len(pending) > 1 and (result := _result(graph, pending))[0] in wanted:
            yield result
    if graph is not None:
        graph.push(None if pushed > 1 else pending[0][1])  # bwdif leaves a single frame as it is
        if (result := _result(graph, pending))[0] in wanted:
            yield result


def _bwdif(frame: av.VideoFrame) -> av.filter.Graph:
    """A graph that deinterlaces frames like this one. It returns a frame when the next is there, or the end."""
    graph = av.filter.Graph()
    graph.threads = 1
    buffer = graph.add(
        "buffer",
        video_size=f"{frame.width}x{frame.height}",
        pix_fmt=frame.format.name,
        time_base=str(frame.time_base or Fraction(1, 1000)),
        colorspace=str(int(frame.colorspace)),
        range=str(int(frame.color_range)),
    )
    deinterlace = graph.add("bwdif", mode="send_frame", parity="auto", deint="all")
    graph.link_nodes(buffer, deinterlace, graph.add("buffersink")).configure()
    return graph


def _result(graph: av.filter.Graph, pending: deque[tuple[int, av.VideoFrame]]) -> tuple[int, av.VideoFrame]:
    """The oldest pending frame with its number, or what the graph has made of it if it is interlaced."""
    number, frame = pending.popleft()
    filtered = graph.vpull()
    return number, filtered if frame.interlaced_frame else frame


def _shape(frame: av.VideoFrame) -> tuple[str, int, int]:
    return frame.format.name, frame.width, frame.height
