"""Encodes video that plays while it is written: fragmented mp4 or live WebM, frame by frame.

Shapes: H W pixels. Frames are uint8 RGB.
"""

import io
import tempfile
from collections.abc import Iterable
from fractions import Fraction
from typing import IO

import av
import numpy as np
from av.container import OutputContainer

from ardiff.data.encode import VideoCodec, keep_scheduling

_FRAGMENTED = {
    "movflags": "frag_every_frame+empty_moov+default_base_moof+frag_discont+skip_trailer",
    "use_editlist": "0",
    "avoid_negative_ts": "disabled",  # a fragment keeps the time of its packet
    "flush_packets": "1",
}
KEY_FRAMES = 64
"""Most frames from one key frame to the next. Seeking and late readers need key frames."""
_LIVE = {"live": "1", "cluster_time_limit": "1", "flush_packets": "1"}
_ENCODERS: dict[VideoCodec, tuple[str, str, dict[str, str]]] = {
    "h264": ("libx264", "mp4", {"preset": "veryfast", "tune": "zerolatency", "bf": "0"}),
    "vp9": ("libvpx-vp9", "webm", {"deadline": "realtime", "cpu-used": "6", "lag-in-frames": "0", "b": "0"}),
    "av1": ("libsvtav1", "mp4", {"preset": "8", "svtav1-params": "pred-struct=1:lp=1:lookahead=0"}),
}


class FragmentWriter:
    """Encodes one video in one thread. Each frame's bytes are returned with the frame.

    libavformat holds a packet back until the next one gives its duration, and PyAV cannot flush it. The duration is
    known here, so each packet gets its own muxer, which is closed after it.

    >>> writer = FragmentWriter(32, 32, fps=8)
    >>> header = writer.start()
    >>> fragment = writer.add(frame)
    >>> rest = writer.finish()
    """

    def __init__(self, height: int, width: int, fps: float, codec: VideoCodec = "h264", crf: int = 18) -> None:
        encoder, self.container_format, options = _ENCODERS[codec]
        self.codec = codec
        self._fragments = 0
        self._sink = _Sink()
        self._container = self._open()
        stream = self._container.add_stream(encoder, rate=Fraction(fps).limit_denominator(1001))
        assert isinstance(stream, av.VideoStream)
        self._stream = stream
        stream.options = {**options, "crf": str(crf)}
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        stream.codec_context.gop_size = KEY_FRAMES
        stream.codec_context.thread_count = 1

    def start(self) -> bytes:
        """The header of the file."""
        with keep_scheduling():
            self._container.start_encoding()
        return self._sink.take()

    @property
    def media_type(self) -> str:
        """The MIME type with its ``codecs`` parameter (RFC 6381), for Media Source Extensions; after ``start``."""
        match self.codec:
            case "h264":
                # The three bytes after avcC's version: profile, constraints, level.
                extradata = self._stream.codec_context.extradata or b"\x01\x42\xc0\x0a"
                if extradata[0] != 1:  # Annex B: a start code, then the SPS
                    extradata = extradata[extradata.index(b"\x00\x00\x01") + 3 :]
                return f'video/mp4; codecs="avc1.{extradata[1:4].hex()}"'
            case "vp9":
                return 'video/webm; codecs="vp9"'
            case "av1":
                return 'video/mp4; codecs="av01.0.04M.08"'

    def add(self, frame: np.ndarray) -> bytes:
        """Encodes a frame, uint8 ``(H, W, 3)``. Returns the bytes that are complete."""
        frame = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        return self._mux(self._stream.encode(picture))

    def finish(self) -> bytes:
        """The rest of the file; empty if the encoder holds no frame back."""
        rest = self._mux(self._stream.encode(None))
        self._container.close()
        return rest

    def _open(self) -> OutputContainer:
        options = {"fflags": "+bitexact", **_LIVE}
        if self.container_format == "mp4":
            options = {"fflags": "+bitexact", **_FRAGMENTED, "fragment_index": str(self._fragments + 1)}
        return av.open(self._sink, "w", format=self.container_format, container_options=options)

    def _mux(self, packets: Iterable[av.Packet]) -> bytes:
        data = b""
        for packet in packets:
            with self._open() as container:
                stream = container.add_stream_from_template(self._stream, opaque=True)
                container.start_encoding()
                self._sink.take()  # drops the repeated header
                packet.stream, packet.duration = stream, 1
                container.mux(packet)
            self._fragments += 1
            data += self._sink.take()
        return data


class _Sink:
    """A file without seeking, so that the muxer never changes earlier bytes."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._chunks.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        data, self._chunks = b"".join(self._chunks), []
        return data


def as_file(streamed: bytes) -> bytes:
    """Remuxes a stream to a file in which players can seek: with one index, for mp4 at the front."""
    with _remux(io.BytesIO(streamed), {"movflags": "+faststart"}, {}) as file:
        return file.read()


def as_fragments(file: IO[bytes] | io.RawIOBase) -> IO[bytes]:
    """Remuxes a file to fragments, as they are streamed. Returns an open temporary file."""
    return _remux(file, _FRAGMENTED, _LIVE)


def _remux(source_file: IO[bytes] | io.RawIOBase, mp4: dict[str, str], webm: dict[str, str]) -> IO[bytes]:
    target = tempfile.NamedTemporaryFile()  # noqa: SIM115
    with av.open(source_file, "r", buffer_size=2**18) as source:
        kind = "webm" if "webm" in source.format.name else "mp4"
        options = {"fflags": "+bitexact", **(mp4 if kind == "mp4" else webm)}
        with av.open(target.name, "w", format=kind, container_options=options) as container:
            video = source.streams.video[0]
            stream = container.add_stream_from_template(video, opaque=True)
            for packet in source.demux(video):
                if packet.dts is not None:
                    packet.stream = stream
                    container.mux(packet)
    target.seek(0)
    return target
