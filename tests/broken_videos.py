"""A corpus of video files: files with different kinds of damage, and unusual files that are valid."""

import io
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

NUM_FRAMES = 24


def picture(frame: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth colour picture uint8 (H, W, 3) for each frame number."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(0.15 * x + 0.4 * frame), np.cos(0.11 * y + 0.2 * frame), np.sin(0.07 * (x + y) - 0.3 * frame)]
    return (128 + 90 * np.stack(waves, axis=-1)).round().astype(np.uint8)


def encode(
    codec: str = "libx264",
    container: str = "mp4",
    *,
    frames: int = NUM_FRAMES,
    height: int = 48,
    width: int = 64,
    pix_fmt: str = "yuv420p",
    times: list[int] | None = None,
    rate: int = 8,
    **options: Any,
) -> bytes:
    """A video of :func:`picture`; ``times`` are those of its frames in milliseconds."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.options = {"g": "6", "threads": "1", **{name.replace("_", "-"): str(v) for name, v in options.items()}}
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, height, width), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def sound() -> bytes:
    """An mp4 with only an audio stream."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        for number in range(8):
            frame.pts = number * 1024
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def corrupted(data: bytes, packet: int = 12) -> bytes:
    """The mp4 with one packet replaced by random bytes."""
    with av.open(io.BytesIO(data)) as container:
        entry = container.streams.video[0].index_entries[packet]
        start, end = entry.pos, entry.pos + entry.size
    return data[:start] + np.random.default_rng(0).bytes(end - start) + data[end:]


def rotated(data: bytes) -> bytes:
    """The mp4 with a display matrix that turns it by 90 degrees, written into its ``tkhd`` box."""
    place, one = data.index(b"tkhd") + 44, 1 << 16
    return data[:place] + struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30) + data[place + 36 :]


def huge_header() -> bytes:
    """An AVI of JPEG pictures whose headers, the file's and the pictures', claim 20000 x 10000 pixels."""
    data = bytearray(encode("mjpeg", "avi", pix_fmt="yuvj420p"))
    for box, skip in ((b"avih", 40), (b"strf", 12)):
        place = data.index(box) + skip
        data[place : place + 8] = struct.pack("<II", 20000, 10000)
    return bytes(data).replace(b"\x08" + struct.pack(">HH", 48, 64), b"\x08" + struct.pack(">HH", 10000, 20000))


def cut_off() -> bytes:
    """An AVI that ends early, as an interrupted copy leaves it."""
    whole = encode("mpeg4", "avi")
    return whole[: len(whole) * 7 // 10]


def still(frame: int, kind: str = "PNG") -> bytes:
    """One picture of a frame folder."""
    buffer = io.BytesIO()
    Image.fromarray(picture(frame)).save(buffer, kind)
    return buffer.getvalue()


def broken() -> dict[str, tuple[bytes, str]]:
    """Files that cannot be used: content and expected kind of error."""
    good = encode()
    return {
        "truncated.avi": (cut_off(), "truncated"),
        "no index.mp4": (good[: len(good) // 2], "undecodable"),
        "zero bytes.mp4": (b"", "empty"),
        "audio only.mp4": (sound(), "no video stream"),
        "words.mp4": (b"These are words, not pictures. " * 40, "undecodable"),
        "corrupt packet.mp4": (corrupted(good), "corrupt"),
        "huge header.avi": (huge_header(), "too large"),
        "frames with a hole/1.png": (still(1), "truncated"),
        "frames with a hole/2.png": (still(2)[:300], "truncated"),
    }


IRREGULAR = [0, 100, 150, 400, 410, 800, 900, 1000, 1100, 1500]
"""Milliseconds at which the ten frames of the file with a variable frame rate are shown."""


def odd() -> dict[str, tuple[bytes, tuple[int, int, int, int]]]:
    """Valid files: content, and (frames, width, height, rotation)."""
    return {
        "one frame.mp4": (encode(frames=1), (1, 64, 48, 0)),
        "ten bits.mp4": (encode(pix_fmt="yuv420p10le"), (NUM_FRAMES, 64, 48, 0)),
        "rotated.mp4": (rotated(encode()), (NUM_FRAMES, 48, 64, 270)),
        "variable rate.mkv": (encode(container="matroska", frames=10, times=IRREGULAR), (10, 64, 48, 0)),
        "wrong extension.avi": (encode("libvpx-vp9", "webm", deadline="realtime", cpu_used=8), (NUM_FRAMES, 64, 48, 0)),
        "odd size.mkv": (encode("mjpeg", "matroska", height=47, width=61, pix_fmt="yuvj444p"), (NUM_FRAMES, 61, 47, 0)),
        "späße & 100% #1?.mp4": (encode(), (NUM_FRAMES, 64, 48, 0)),
    }


def write(folder: Path) -> None:
    """Writes the corpus."""
    for name, (data, _) in [*broken().items(), *odd().items()]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "frames").mkdir()
    for number in range(12):
        (folder / "frames" / f"{number}.jpg").write_bytes(still(number, "JPEG"))
