"""Video files as they lie on disks: written by many tools, whose headers are wrong, odd or incomplete."""

import io
import struct
from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np
from av.stream import Disposition
from broken_videos import NUM_FRAMES, encode, picture
from PIL import Image


def boxed(data: bytes, box: bytes, offset: int, value: bytes) -> bytes:
    """The file with bytes replaced ``offset`` behind the name of its first ``box``."""
    place = data.index(box) + 4 + offset
    return data[:place] + value + data[place + len(value) :]


def oriented(matrix: list[float]) -> bytes:
    """An mp4 whose display matrix is ``a b c d``."""
    a, b, c, d = (round(value * (1 << 16)) for value in matrix)
    return boxed(encode(), b"tkhd", 40, struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30))


def remuxed(
    data: bytes,
    container: str,
    *,
    keep: Callable[[int], bool] = lambda index: True,
    last_duration: float | None = None,
    streamed: bool = False,
    **options: str,
) -> bytes:
    """The packets of a file in another one.

    Args:
        data: The file.
        container: Format of the new one.
        keep: Whether the packet with a number is kept.
        last_duration: Seconds for which the last packet is shown.
        streamed: Whether the new file is written to a pipe, which cannot seek back to the header.
        options: Options of the format.
    """
    buffer: io.BytesIO = io.BytesIO()
    if streamed:
        buffer.seekable = lambda: False  # type: ignore[method-assign]
    with av.open(io.BytesIO(data), "r") as source, av.open(buffer, "w", format=container, options=options) as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.dts is not None]
        if last_duration is not None and packets[-1].time_base is not None:
            packets[-1].duration = round(last_duration / packets[-1].time_base)
        for index, packet in enumerate(packets):
            if keep(index):
                packet.stream = copy
                target.mux(packet)
    return buffer.getvalue()


def mpeg4(container: str, *, skipped: tuple[int, ...] = (), b_frames: int = 0, frames: int = NUM_FRAMES) -> bytes:
    """MPEG-4 part 2 at 8 frames per second, without the frames whose numbers are ``skipped``."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"g": "6", "bf": str(b_frames)}
        for number in range(frames):
            if number not in skipped:
                frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 8)
                out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def all_key_frames(data: bytes) -> bytes:
    """The AVI whose index marks every frame as a key frame."""
    place = data.index(b"idx1")
    length = int.from_bytes(data[place + 4 : place + 8], "little")
    index = bytearray(data[place + 8 : place + 8 + length])
    for entry in range(0, length, 16):
        index[entry + 4] |= 0x10
    return data[: place + 8] + bytes(index) + data[place + 8 + length :]


def with_cover(sound: bool) -> bytes:
    """A file with a cover picture: a song, or a video."""
    buffer, cover = io.BytesIO(), io.BytesIO()
    Image.fromarray(picture(0, 120, 120)).save(cover, "JPEG")
    with av.open(buffer, "w", format="mp4") as out:
        attached = out.add_stream("mjpeg", rate=1)
        attached.width, attached.height, attached.pix_fmt = 120, 120, "yuvj420p"
        attached.disposition = Disposition.attached_pic
        if sound:
            audio = out.add_stream("aac", rate=16000, layout="mono")
        else:
            video = out.add_stream("libx264", rate=8)
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        packet = av.Packet(cover.getvalue())
        packet.stream, packet.pts, packet.dts, packet.time_base = attached, 0, 0, Fraction(1, 8)
        out.mux(packet)
        for number in range(8):
            if sound:
                samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                samples.sample_rate, samples.pts = 16000, 1024 * number
                out.mux(audio.encode(samples))
            else:
                out.mux(video.encode(av.VideoFrame.from_ndarray(picture(number), format="rgb24")))
        out.mux((audio if sound else video).encode(None))
    return buffer.getvalue()


def changing_sizes() -> bytes:
    """A Matroska file whose JPEG pictures become larger after the fourth."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as out:
        stream = out.add_stream("mjpeg", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for number in range(8):
            content = io.BytesIO()
            Image.fromarray(picture(number, 48 if number < 4 else 60)).save(content, "JPEG")
            packet = av.Packet(content.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 8)
            packet.is_keyframe = True
            out.mux(packet)
    return buffer.getvalue()
