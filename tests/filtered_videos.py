"""Interlaced and HDR video files, made by encoders as cameras make them, and what they should look like."""

import io
from collections.abc import Collection
from fractions import Fraction
from typing import Any

import av
import av.filter
import numpy as np

INTERLACED_FRAMES = 14
HEIGHT, WIDTH = 64, 96
PATCH, PATCH_HEIGHT = 4, 128
_MPEG2 = {"codec": "mpeg2video", "container": "matroska", "flags": "+ilme+ildct", "b": "6M"}
_FFV1 = {"codec": "ffv1", "container": "matroska", "flags": "+ildct"}
INTERLACED_FILES: dict[str, dict[str, Any]] = {
    "h264": {"bf": 2},
    "h264, bottom field first": {"top_first": False},
    "mpeg2": _MPEG2,
    "mpeg2 in ts, which does not seek": {**_MPEG2, "container": "mpegts"},
    "mpeg4 in avi": {"codec": "mpeg4", "container": "avi", "flags": "+ilme+ildct", "b": "6M"},
    "ffv1 of 10 bits": {**_FFV1, "pix_fmt": "yuv422p10le"},
    "half progressive": {**_FFV1, "progressive": (0, 1, 2, 6, 7, 9)},
}
"""Options of :func:`interlaced` by the name of the file."""


def scene(field: int) -> np.ndarray:
    """A white bar over a grey ramp, at the time of a field: uint8 ``(H, W, 3)``. It moves three pixels a field."""
    ramp = np.linspace(40, 140, HEIGHT)[:, None].repeat(WIDTH, 1)
    ramp[:, 6 + 3 * field : 14 + 3 * field] = 235
    return ramp[..., None].repeat(3, -1).round().astype(np.uint8)


def interlaced(
    codec: str = "libx264",
    container: str = "mp4",
    *,
    top_first: bool = True,
    pix_fmt: str = "yuv420p",
    progressive: Collection[int] = (),
    frames: int = INTERLACED_FRAMES,
    **options: Any,
) -> bytes:
    """A video whose frame ``n`` holds the fields ``2 n`` and ``2 n + 1``; those that are ``progressive`` hold the first
    alone, and are not marked as interlaced if the codec knows both kinds."""
    graphs = {name: _marking(name, pix_fmt) for name in ("prog", "tff" if top_first else "bff")}
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=25)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pix_fmt
        stream.options = {"g": "5", "threads": "1"} | ({"x264-params": "interlaced=1"} if codec == "libx264" else {})
        stream.options |= {name.replace("_", "-"): str(value) for name, value in options.items()}
        for number in range(frames):
            picture, later = scene(2 * number), scene(2 * number + (number not in progressive))
            picture[int(top_first) :: 2] = later[int(top_first) :: 2]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = number, Fraction(1, 25)
            graph = graphs["prog"] if number in progressive else graphs["tff" if top_first else "bff"]
            graph.push(frame)
            out.mux(stream.encode(graph.vpull()))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def _marking(field_mode: str, pix_fmt: str) -> av.filter.Graph:
    """Marks frames as interlaced, with the top or the bottom field first, or as progressive."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=WIDTH, height=HEIGHT, format=pix_fmt, time_base=Fraction(1, 25))
    graph.link_nodes(source, graph.add("setfield", field_mode), graph.add("buffersink")).configure()
    return graph


def hdr(codes: np.ndarray, transfer: int, primaries: int = 9) -> bytes:
    """A lossless video of patches side by side in R'G'B' ``codes`` ``(n, 3)`` from 0 to 1, as 10-bit YUV of BT.2020."""
    y, cb, cr = np.rint(to_yuv(codes)).astype(np.uint16).T
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as out:
        stream = out.add_stream("ffv1", rate=25)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = PATCH * len(codes), PATCH_HEIGHT, "yuv444p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace, context.color_range = transfer, primaries, 9, 1
        frame = av.VideoFrame(stream.width, PATCH_HEIGHT, "yuv444p10le")
        frame.colorspace, frame.color_range, frame.color_trc, frame.color_primaries = 9, 1, transfer, primaries
        for plane, values in zip(frame.planes, (y, cb, cr), strict=True):
            row = np.zeros(plane.line_size // 2, np.uint16)
            row[: stream.width] = values.repeat(PATCH)
            plane.update(np.tile(row, PATCH_HEIGHT).tobytes())
        for number in range(3):
            frame.pts, frame.time_base = number, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def to_yuv(codes: np.ndarray) -> np.ndarray:
    """ITU-R BT.2020, tables 4 and 5: 10-bit Y'CbCr ``(n, 3)``, not rounded, of R'G'B'."""
    y = codes @ [0.2627, 0.6780, 0.0593]
    cb, cr = (codes[:, 2] - y) / 1.8814, (codes[:, 0] - y) / 1.4746
    return np.stack([876 * y + 64, 896 * cb + 512, 896 * cr + 512], axis=-1)


def from_yuv(yuv: np.ndarray) -> np.ndarray:
    """The R'G'B' of rounded Y'CbCr."""
    y, cb, cr = (np.rint(yuv) - [64, 512, 512]).T / np.array([876, 896, 896])[:, None]
    red, blue = y + 1.4746 * cr, y + 1.8814 * cb
    return np.stack([red, (y - 0.2627 * red - 0.0593 * blue) / 0.6780, blue], axis=-1)
