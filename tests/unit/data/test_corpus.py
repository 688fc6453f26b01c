"""Many combinations of codec, container and timing: the probe and seeks against FFmpeg's own decoding of the file.

The reference opens the file with FFmpeg's defaults and decodes it from start to end, without any code of ours.
"""

import io
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import pytest
from broken_videos import encode

from ardiff.data.decode import decode_frames, frame_times
from ardiff.data.probe import probe

FRAMES = 14
X264 = {"codec": "libx264", "preset": "ultrafast"}
VARIANTS: dict[str, dict[str, Any]] = {
    "h264": {**X264, "bf": 0},
    "h264 b": {"codec": "libx264", "preset": "veryfast", "bf": 3},
    "h264 open": {"codec": "libx264", "x264_params": "open-gop=1:bframes=3"},
    "h264 refresh": {**X264, "x264_params": "intra-refresh=1"},
    "h264 10 bits": {**X264, "pix_fmt": "yuv420p10le"},
    "h264 444": {**X264, "pix_fmt": "yuv444p"},
    "h264 ntsc": {**X264, "rate": 30},
    "hevc": {"codec": "libx265", "preset": "ultrafast", "x265_params": "log-level=none:pools=none:frame-threads=1"},
    "mpeg4": {"codec": "mpeg4"},
    "mpeg4 b": {"codec": "mpeg4", "bf": 2},
    "mpeg2": {"codec": "mpeg2video", "rate": 25},
    "mpeg2 b": {"codec": "mpeg2video", "rate": 25, "bf": 2},
    "mpeg1": {"codec": "mpeg1video", "rate": 25},
    "mpeg1 b": {"codec": "mpeg1video", "rate": 25, "bf": 2},
    "mjpeg": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "vp8": {"codec": "libvpx", "deadline": "realtime", "cpu_used": 8},
    "vp9": {"codec": "libvpx-vp9", "deadline": "realtime", "cpu_used": 8},
    "msmpeg4": {"codec": "msmpeg4"},
    "wmv2": {"codec": "wmv2"},
    "flv1": {"codec": "flv"},
    "ffv1": {"codec": "ffv1"},
    "huffyuv": {"codec": "huffyuv", "pix_fmt": "yuv422p"},
    "prores": {"codec": "prores", "pix_fmt": "yuv422p10le"},
    "png": {"codec": "png", "pix_fmt": "rgb24"},
}
IRREGULAR = [0, 100, 150, 400, 410, 800, 900, 1000, 1100, 1500, 1600, 1610, 1900, 2000, 2100, 2500, 2600, 2900, 3000]
CONTAINERS = {
    "mp4": "h264,h264 b,h264 open,h264 refresh,h264 10 bits,h264 444,h264 ntsc,hevc,mpeg4,mpeg4 b,mpeg2,mjpeg,vp9,png",
    "mov": "hevc,h264,h264 b,mpeg4,mpeg4 b,mjpeg,prores,png",
    "matroska": "h264,h264 b,h264 open,h264 refresh,hevc,mpeg4,mpeg4 b,mpeg2 b,mpeg1,mjpeg,vp8,vp9,ffv1,prores",
    "webm": "vp8,vp9",
    "avi": "h264,h264 b,mpeg4,mpeg4 b,mpeg2,mpeg1,mpeg2 b,mpeg1 b,mjpeg,msmpeg4,wmv2,flv1,ffv1,huffyuv,png",
    "mpegts": "h264,h264 b,h264 open,hevc,mpeg4,mpeg2,mpeg2 b,mpeg1,mpeg1 b",
    "mpeg": "mpeg1 b,mpeg2,mpeg2 b",
    "flv": "h264,h264 b,flv1",
    "asf": "msmpeg4,wmv2,mpeg4",
    "mxf": "mpeg2,mpeg2 b",
}
CORPUS = [(container, name) for container, names in CONTAINERS.items() for name in names.split(",")]


def cases() -> list[Any]:
    """The corpus. Only the first file of each kind of video, and of each container, is fast."""
    seen: set[str] = set()
    marked = []
    for container, name in CORPUS:
        marks = () if {container, name} - seen else (pytest.mark.slow,)
        marked.append(pytest.param(container, name, marks=marks, id=f"{container} {name}"))
        seen |= {container, name}
    return marked


def reference(data: bytes) -> Iterator[np.ndarray]:
    """All frames, as FFmpeg's defaults decode them."""
    with av.open(io.BytesIO(data)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def check(data: bytes) -> None:
    """The number of frames, and the pixels at the start, in the middle and at the end, each after a seek."""
    expected = list(reference(data))
    found = probe(data)
    assert found.num_frames == len(expected)
    assert (found.height, found.width) == expected[0].shape[:2]
    for number in (0, len(expected) // 2, len(expected) - 1):
        [picture] = decode_frames(data, [number], None, found.timing).values()
        assert np.array_equal(picture, expected[number]), number
    wanted = [len(expected) // 2 - 1, len(expected) // 2, len(expected) - 1]
    several = decode_frames(data, wanted, None, found.timing)
    assert all(np.array_equal(several[number], expected[number]) for number in wanted)


def test_the_corpus_is_large() -> None:
    assert len(CORPUS) >= 60


@pytest.mark.parametrize(("container", "name"), cases())
def test_frames_are_those_of_ffmpeg(container: str, name: str) -> None:
    variant = VARIANTS[name]
    data = encode(container=container, frames=FRAMES, **variant)
    check(data)
    found, rate = probe(data), variant.get("rate", 8)
    assert found.fps == pytest.approx(rate, rel=1e-3)
    assert found.num_frames == FRAMES
    assert probe(data, "packets") == found


@pytest.mark.parametrize("name", ["h264", "h264 b", "mjpeg", "vp9"])
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_frames_at_irregular_times(container: str, name: str) -> None:
    data = encode(container=container, frames=len(IRREGULAR), times=IRREGULAR, **VARIANTS[name])
    check(data)
    found = probe(data)
    assert found.timing.step == 0
    assert probe(data, "packets") == found
    assert np.allclose(frame_times(data, len(IRREGULAR)), np.array(IRREGULAR) / 1000, atol=2e-3)
    assert found.fps == pytest.approx(1000 * (len(IRREGULAR) - 1) / IRREGULAR[-1], rel=1e-2)
