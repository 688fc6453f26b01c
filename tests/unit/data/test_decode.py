"""Clips against a whole decode, geometry against arithmetic, and every kind of bad file that was met."""

import io
import struct
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.random import default_rng
from PIL import Image

from ardiff.data.decode import decode_clip
from ardiff.data.encode import encode_video
from ardiff.data.pictures import decode_image
from ardiff.data.probe import probe
from ardiff.errors import ClipTooShortError, DecodeError
from ardiff.resolution import Resolution


def moving_ramp(num_frames: int, height: int, width: int) -> np.ndarray:
    """Smooth grey video uint8 (F, H, W, 3), another picture each frame."""
    f, y, x = np.meshgrid(np.arange(num_frames), np.arange(height), np.arange(width), indexing="ij")
    grey = 128 + 60 * np.sin(0.15 * x + 0.4 * f) + 50 * np.cos(0.11 * y)
    return np.repeat(grey[..., None], 3, axis=-1).round().astype(np.uint8)


def rotated(data: bytes, degrees: int) -> bytes:
    """The mp4 with a display matrix that asks for a clockwise rotation, written into its ``tkhd`` box."""
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    place = data.index(b"tkhd") + 44
    one = 1 << 16
    return (
        data[:place]
        + struct.pack(">9i", cos * one, sin * one, 0, -sin * one, cos * one, 0, 0, 0, 1 << 30)
        + data[place + 36 :]
    )


def remuxed(data: bytes, path: Path, *, skip: int = 0, options: dict[str, str] | None = None) -> bytes:
    """The same packets in another file, ``skip`` frames before the presentation starts (an edit list hides them)."""
    with av.open(io.BytesIO(data)) as source, av.open(str(path), "w", options=options or {}) as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None and packet.pts is not None and packet.time_base is not None:
                shift = round(skip / 8 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                target.mux(packet)
    return path.read_bytes()


def mpeg4(frames: np.ndarray, container_format: str) -> bytes:
    """MPEG-4 part 2 video with a key frame every fourth frame."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container_format) as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.gop_size = 4
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def video() -> bytes:
    return encode_video(moving_ramp(40, 48, 64), 8, crf=4)


@pytest.fixture(scope="module")
def frames(video: bytes) -> np.ndarray:
    return decode_clip(video, 0, 40)


def test_probe(video: bytes) -> None:
    found = probe(video)
    assert (found.codec, found.width, found.height, found.fps, found.num_frames) == ("h264", 64, 48, 8.0, 40)


@pytest.mark.parametrize(("start", "num_frames", "stride"), [(0, 1, 1), (3, 16, 1), (39, 1, 5), (1, 10, 4), (0, 40, 1)])
def test_clip_equals_slice_of_whole_decode(
    video: bytes, frames: np.ndarray, start: int, num_frames: int, stride: int
) -> None:
    clip = decode_clip(video, start, num_frames, stride)
    assert clip.dtype == np.uint8
    assert np.array_equal(clip, frames[start : start + num_frames * stride : stride])


def test_too_short(video: bytes) -> None:
    with pytest.raises(ClipTooShortError, match="needs frame 40, the video has 40 frames"):
        decode_clip(video, 25, 16)
    with pytest.raises(ClipTooShortError):
        decode_clip(video, 39, 2)


@pytest.mark.parametrize(("start", "num_frames", "stride"), [(-1, 2, 1), (0, 0, 1), (0, 1, 0)])
def test_impossible_requests(video: bytes, start: int, num_frames: int, stride: int) -> None:
    with pytest.raises(ValueError, match="there is no clip"):
        decode_clip(video, start, num_frames, stride)


def test_resize_short_side_then_centre_crop() -> None:
    wide = np.zeros((2, 64, 128, 3), np.uint8)
    wide[:, :, 32:96] = 200  # the central square is bright, all else is dark
    clip = decode_clip(encode_video(wide, 8, crf=4), 0, 2, resolution=Resolution.square(32))
    assert clip.shape == (2, 32, 32, 3)
    assert clip[:, :, 2:-2].min() > 190
    tall = np.ascontiguousarray(wide.swapaxes(1, 2))
    assert decode_clip(encode_video(tall, 8, crf=4), 0, 2, resolution=Resolution.square(32))[:, 2:-2].min() > 190


def test_downscale_averages() -> None:
    """A one-pixel checkerboard becomes even grey: aliasing would keep or fold the pattern."""
    y, x = np.mgrid[:128, :128]
    board = np.repeat(((y + x) % 2 * 255).astype(np.uint8)[None, ..., None], 3, axis=-1)
    clip = decode_clip(encode_video(board, 8, crf=0), 0, 1, resolution=Resolution.square(32)).astype(float)
    assert clip.std() < 4
    assert abs(clip.mean() - 127.5) < 6


@pytest.mark.parametrize("resolution", [31, 48, 63, 96])
def test_any_resolution_gives_a_square(video: bytes, resolution: int) -> None:
    assert decode_clip(video, 0, 2, resolution=Resolution.square(resolution)).shape == (2, resolution, resolution, 3)


def test_same_resolution_is_a_crop_only(video: bytes, frames: np.ndarray) -> None:
    assert np.array_equal(decode_clip(video, 0, 5, resolution=Resolution.square(48)), frames[:5, :, 8:56])


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_honoured(video: bytes, frames: np.ndarray, degrees: int) -> None:
    data = rotated(video, degrees)
    expected = np.rot90(frames[:3], -degrees // 90, axes=(1, 2))
    assert np.array_equal(decode_clip(data, 0, 3), expected)
    found = probe(data)
    assert (found.height, found.width) == expected.shape[1:3]


def test_empty_text_and_junk_files() -> None:
    for data, reason in [
        (b"", "empty"),
        (b"hello text" * 50, "cannot be decoded"),
        (b"\x89PNG" + bytes(99), "decoded"),
    ]:
        with pytest.raises(DecodeError, match=reason):
            probe(data)
        with pytest.raises(DecodeError, match=reason):
            decode_clip(data, 0, 1)


def test_file_without_video() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mov") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        samples.sample_rate = 8000
        container.mux(stream.encode(samples))
    with pytest.raises(DecodeError, match="no video stream"):
        probe(buffer.getvalue())


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.95])
@pytest.mark.parametrize("moov_first", [False, True])
def test_truncated_mp4(video: bytes, tmp_path: Path, share: float, moov_first: bool) -> None:
    data = remuxed(video, tmp_path / "v.mp4", options={"movflags": "+faststart"}) if moov_first else video
    for count in ("decode", "packets"):
        with pytest.raises(DecodeError):
            probe(data[: int(len(data) * share)], count)


def test_mp4_truncated_between_two_frames(video: bytes, tmp_path: Path) -> None:
    data = remuxed(video, tmp_path / "v.mp4", options={"movflags": "+faststart"})
    assert probe(data).num_frames == 40
    with av.open(io.BytesIO(data)) as container:
        places = [entry.pos for entry in container.streams.video[0].index_entries]  # gone with the container
    for place in (places[1], places[20], places[39]):
        with pytest.raises(DecodeError):
            probe(data[:place])


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_truncated_avi(share: float) -> None:
    data = mpeg4(moving_ramp(40, 48, 64), "avi")
    assert probe(data).num_frames == 40
    with pytest.raises(DecodeError):
        probe(data[: int(len(data) * share)])


def test_frames_hidden_by_an_edit_list_are_no_damage(video: bytes, frames: np.ndarray, tmp_path: Path) -> None:
    data = remuxed(video, tmp_path / "v.mp4", skip=10)
    assert probe(data).num_frames == 30
    assert probe(data, "packets") == probe(data)
    assert np.array_equal(decode_clip(data, 0, 30), frames[10:])
    with pytest.raises(ClipTooShortError):
        decode_clip(data, 0, 31)


def test_whole_groups_of_frames_hidden_by_an_edit_list(tmp_path: Path) -> None:
    """The demuxer drops such groups from its index, so the frames announced exceed the packets in the file."""
    data = mpeg4(moving_ramp(40, 48, 64), "mp4")
    cut = remuxed(data, tmp_path / "v.mp4", skip=18)
    assert probe(cut).num_frames == 22
    assert probe(cut, "packets") == probe(cut)
    assert np.array_equal(decode_clip(cut, 0, 22), decode_clip(data, 18, 22))


def test_corrupt_bytes_are_noticed(video: bytes) -> None:
    with av.open(io.BytesIO(video)) as container:
        entry = container.streams.video[0].index_entries[5]
        start, end = entry.pos, entry.pos + entry.size
    data = video[:start] + default_rng(0).bytes(end - start) + video[end:]
    with pytest.raises(DecodeError, match="cannot be decoded"):
        probe(data)
    with pytest.raises(DecodeError, match="cannot be decoded"):
        decode_clip(data, 0, 16)
    assert probe(data, "packets") == probe(video)  # it does not look into packets


@pytest.mark.parametrize("resolution", [Resolution(36, 64), Resolution(64, 36), Resolution(30, 50)])
@pytest.mark.parametrize("size", [(64, 128), (128, 64), (90, 90), (40, 32)])
def test_frames_cover_a_rectangle_and_lose_the_same_at_both_ends(size: tuple[int, int], resolution: Resolution) -> None:
    """Ramps along both axes: the scale is the same along both, and what is cut is cut evenly."""
    y, x = np.mgrid[: size[0], : size[1]]
    ramps = np.stack([255 * (y + 0.5) / size[0], 255 * (x + 0.5) / size[1], 0 * y], axis=-1).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(ramps).save(buffer, "PNG")
    pixels = decode_image(buffer.getvalue(), resolution)
    scale = max(resolution.height / size[0], resolution.width / size[1])
    assert pixels.shape[:2] == tuple(max(round(s * scale), r) for s, r in zip(size, resolution, strict=True))
    [clip] = decode_clip(encode_video(ramps[None], 8, crf=1), 0, 1, resolution=resolution).astype(float)
    assert clip.shape == (*resolution, 3)
    for channel, (across, length) in enumerate(zip(resolution, size, strict=True)):
        ends = clip[..., channel].mean(axis=1 - channel)[[1, -2]]
        assert ends.mean() == pytest.approx(127, abs=6)
        shown = min(across / (length * scale), 1.0)  # the part of the picture that remains
        assert np.ptp(ends) == pytest.approx(255 * shown * (across - 3) / across, abs=10)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_rotated_video_covers_the_rectangle_after_it_is_turned(video: bytes, degrees: int) -> None:
    turned = rotated(video, degrees)
    [upright] = decode_clip(turned, 0, 1)
    [clip] = decode_clip(turned, 0, 1, resolution=Resolution(*upright.shape[:2]))
    assert np.array_equal(clip, upright)
    assert decode_clip(turned, 0, 1, resolution=Resolution(20, 90)).shape == (1, 20, 90, 3)
