"""Files as many tools write them: each kind of odd or wrong header, and what comes out."""

import io
import struct
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import real_videos
from broken_videos import NUM_FRAMES, encode, picture
from PIL import Image
from real_videos import boxed, mpeg4, oriented, remuxed

from ardiff.data.decode import decode_clip, decode_frames, frame_times
from ardiff.data.pictures import decode_image
from ardiff.data.probe import probe
from ardiff.errors import DecodeError
from ardiff.resolution import Resolution

VP9 = {"codec": "libvpx-vp9", "container": "webm", "deadline": "realtime", "cpu_used": 8}


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other.astype(float)).mean())


def error_of(data: bytes) -> DecodeError:
    with pytest.raises(DecodeError) as info:
        probe(data)
    return info.value


# Frame rates


def wrong_default_duration() -> bytes:
    data = encode(container="matroska")
    place = data.index(b"\x23\xe3\x83") + 3
    assert data[place] == 0x84  # four bytes
    return data[: place + 1] + struct.pack(">I", 1_000_000) + data[place + 5 :]


@pytest.mark.parametrize(
    ("data", "fps", "num_frames"),
    [
        pytest.param(wrong_default_duration(), 8, NUM_FRAMES, id="mkv that claims 1000 fps"),
        pytest.param(remuxed(encode(bf=0), "mp4", last_duration=10), 8, NUM_FRAMES, id="last frame held"),
        pytest.param(encode("mpeg1video", "mpegts", rate=25, bf=0), 25, NUM_FRAMES, id="mpeg in ts"),
        pytest.param(encode(rate=30), 30, NUM_FRAMES, id="ordinary"),
        pytest.param(encode(container="matroska", rate=30), 30, NUM_FRAMES, id="rounded times"),
        pytest.param(mpeg4("avi", skipped=(5, 9)), 8 * 21 / 23, NUM_FRAMES - 2, id="dropped frames"),
    ],
)
def test_the_rate_comes_from_the_times_of_the_frames(data: bytes, fps: float, num_frames: int) -> None:
    found = probe(data)
    assert found.fps == pytest.approx(fps, rel=1e-9)
    assert found.num_frames == num_frames


def test_dropped_frames_of_an_avi_have_their_times() -> None:
    times = frame_times(mpeg4("avi", skipped=(5, 9)), NUM_FRAMES - 2)
    assert times.tolist() == [number / 8 for number in range(NUM_FRAMES) if number not in (5, 9)]


# Seeks


def test_a_false_key_frame_is_not_believed() -> None:
    good = mpeg4("mp4")
    for data in (good.replace(b"stss", b"free"), real_videos.all_key_frames(mpeg4("avi"))):
        whole, timing = decode_clip(data, 0, NUM_FRAMES), probe(data).timing
        assert timing.step > 0
        for number in range(NUM_FRAMES):
            assert np.array_equal(decode_frames(data, [number], None, timing)[number], whole[number]), number


def test_an_avi_with_b_frames_is_read_from_the_key_frame_on() -> None:
    data = mpeg4("avi", b_frames=2, frames=40)
    found = probe(data)
    assert (found.fps, found.num_frames) == (8, 40)
    whole = decode_clip(data, 0, 40)
    for number in range(40):
        assert np.array_equal(decode_frames(data, [number], None, found.timing)[number], whole[number]), number
    chunk = data.index(b"00dc", data.index(b"movi") + 4)  # the first picture: a decode from the start would fail
    length = int.from_bytes(data[chunk + 4 : chunk + 8], "little")
    damaged = data[: chunk + 8] + bytes(length) + data[chunk + 8 + length :]
    assert np.array_equal(decode_frames(damaged, [30], None, found.timing)[30], whole[30])


@pytest.mark.parametrize("codec", ["libvpx-vp9", "libx264"])
def test_a_file_that_does_not_begin_with_a_key_frame(codec: str) -> None:
    options = {**VP9} if codec == "libvpx-vp9" else {"container": "matroska", "bf": 0}
    good = encode(**options)  # type: ignore[arg-type]
    data = remuxed(good, str(options["container"]), keep=lambda index: index >= 3)
    found = probe(data)
    assert found.num_frames == NUM_FRAMES - 6  # a key frame every 6 frames
    assert np.array_equal(decode_clip(data, 0, 5), decode_clip(good, 6, 5))
    assert np.array_equal(decode_frames(data, [9], None, found.timing)[9], decode_clip(good, 15, 1)[0])


# Whole or not


def test_empty_chunks_and_dropped_frames_are_no_damage() -> None:
    assert probe(mpeg4("avi", skipped=(3, 4, 5))).num_frames == NUM_FRAMES - 3
    data = mpeg4("avi", b_frames=2)
    assert probe(data).num_frames == NUM_FRAMES


def test_missing_pictures_of_an_avi_are_damage() -> None:
    data = mpeg4("avi")
    places = [place for place in range(len(data)) if data[place : place + 4] == b"00dc" and place < data.index(b"idx1")]
    error = error_of(data[: places[8]] + bytes(places[12] - places[8]) + data[places[12] :])
    assert error.kind in ("corrupt", "truncated")
    assert "damaged: 4 pictures" in str(error)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
def test_truncated_matroska(share: float) -> None:
    for data in (encode(container="matroska"), encode(**VP9)):  # type: ignore[arg-type]
        error = error_of(data[: int(len(data) * share)])
        assert error.kind == "truncated"
        assert f"to byte {len(data)}" in str(error)


def test_a_hole_in_a_matroska_file() -> None:
    data = encode(**VP9)  # type: ignore[arg-type]
    start, stop = len(data) * 5 // 10, len(data) * 7 // 10
    assert error_of(data[:start] + bytes(stop - start) + data[stop:]).kind == "corrupt"


def test_live_and_piped_files_are_whole() -> None:
    data = encode(**VP9)  # type: ignore[arg-type]
    assert probe(remuxed(data, "webm", live="1")).num_frames == NUM_FRAMES
    assert probe(remuxed(data, "webm", streamed=True)).num_frames == NUM_FRAMES
    cut = remuxed(data, "webm", streamed=True)
    assert error_of(cut[: len(cut) * 6 // 10]).kind == "truncated"  # within a block


def test_a_file_that_claims_more_samples_than_bytes() -> None:
    many = struct.pack(">I", 30_000_000)
    data = boxed(boxed(boxed(encode(), b"stsz", 4, struct.pack(">I", 1)), b"stsz", 8, many), b"stts", 8, many)
    error = error_of(data)
    assert (error.kind, "claims 30000000 samples" in str(error)) == ("too large", True)


# Which stream, and how its pictures stand


def test_metadata_in_another_encoding() -> None:
    data = remuxed(encode(), "mp4")
    plain = data.replace(b"Lavf", b"L\xdfvf")  # the name of the writer
    assert plain != data
    assert probe(plain).num_frames == NUM_FRAMES


def test_cover_art_is_no_video() -> None:
    found = probe(real_videos.with_cover(sound=False))
    assert (found.codec, found.width, found.height, found.num_frames) == ("h264", 64, 48, 8)
    assert error_of(real_videos.with_cover(sound=True)).kind == "no video stream"


S, C = np.sin(np.radians(1)), np.cos(np.radians(1))
MATRICES: dict[str, tuple[list[float], Callable[[np.ndarray], np.ndarray]]] = {
    "identity": ([1, 0, 0, 1], lambda p: p),
    "90": ([0, 1, -1, 0], lambda p: np.rot90(p, 3)),
    "180": ([-1, 0, 0, -1], lambda p: np.rot90(p, 2)),
    "270": ([0, -1, 1, 0], lambda p: np.rot90(p)),
    "horizontal flip": ([-1, 0, 0, 1], lambda p: p[:, ::-1]),
    "vertical flip": ([1, 0, 0, -1], lambda p: p[::-1]),
    "transpose": ([0, 1, 1, 0], lambda p: p.swapaxes(0, 1)),
    "antitranspose": ([0, -1, -1, 0], lambda p: p[::-1, ::-1].swapaxes(0, 1)),
    "1 degree": ([C, S, -S, C], lambda p: p),
    "91 degrees": ([-S, C, -C, -S], lambda p: np.rot90(p, 3)),
    "scaled": ([0, 2, -2, 0], lambda p: np.rot90(p, 3)),
    "zeros": ([0, 0, 0, 0], lambda p: p),
    "singular": ([1, 1, 1, 1], lambda p: p),
}


@pytest.mark.parametrize("name", MATRICES)
def test_orientation(name: str) -> None:
    matrix, upright = MATRICES[name]
    data = oriented(matrix)
    [stored] = decode_clip(encode(), 0, 1)
    [shown] = decode_clip(data, 0, 1)
    assert np.array_equal(shown, upright(stored))
    found = probe(data)
    assert (found.height, found.width) == shown.shape[:2]


@pytest.mark.parametrize(("aspect", "size"), [("64/45", (91, 48)), ("1/2", (64, 96)), ("640/639", (64, 48))])
def test_pixels_become_square(aspect: str, size: tuple[int, int]) -> None:
    data = encode(x264_params=f"sar={aspect}")
    found, width, height = probe(data), *size
    assert (found.width, found.height) == size
    assert found.pixel_aspect == (1 if size == (64, 48) else pytest.approx(float(Fraction(aspect))))
    [shown] = decode_clip(data, 0, 1)
    assert shown.shape == (height, width, 3)
    square = Image.fromarray(picture(0)).resize(size, Image.Resampling.BICUBIC)
    assert distance(shown, np.asarray(square)) < 6
    assert decode_frames(data, [0], Resolution.square(24))[0].shape == (
        24 * height // min(size),
        round(24 * width / min(size)),
        3,
    )


def test_a_size_that_changes_is_an_error() -> None:
    error = error_of(real_videos.changing_sizes())
    assert (error.kind, "(64 x 48, 64 x 60)" in str(error)) == ("size changes", True)


def test_narrow_pictures_are_refused() -> None:
    """Scaled to 256 pixels of height, a picture of 3000 x 2 would need 295 MB."""
    assert error_of(encode("mjpeg", "matroska", height=2, width=3000, pix_fmt="yuvj444p")).kind == "too narrow"
    buffer = io.BytesIO()
    Image.new("RGB", (3000, 2)).save(buffer, "PNG")
    with pytest.raises(DecodeError, match="narrower than 1:16"):
        decode_image(buffer.getvalue())


# Pictures


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_pictures_of_16_bits_are_scaled(kind: str) -> None:
    values = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind)
    expected = np.round(values / 257).astype(np.uint8)
    assert np.array_equal(decode_image(buffer.getvalue()), np.repeat(expected[..., None], 3, axis=-1))


def test_pictures_without_a_range_of_values_are_refused() -> None:
    for values in (np.ones((8, 8), np.float32), np.full((8, 8), 1 << 20, np.int32)):
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "TIFF")
        with pytest.raises(DecodeError, match="its values"):
            decode_image(buffer.getvalue())


@pytest.mark.parametrize("kind", ["WEBP", "BMP", "TIFF"])
def test_other_kinds_of_pictures(kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture(3)).save(buffer, kind, lossless=True)
    assert np.array_equal(decode_image(buffer.getvalue()), picture(3))


# Messages


def encrypted() -> bytes:
    data = boxed(encode(), b"stsd", 12, b"encv")
    return boxed(data, b"avcC", -4, b"sinf")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
MESSAGES = {
    "html": (b"\n<!DOCTYPE html><html><body>404 Not Found</body></html>", "an HTML page"),
    "git lfs": (LFS, "git lfs pull"),
    "text": ("Größe: 3\n".encode() * 900, "it is text"),
    "zeros": (bytes(5000), "all zeros"),
    "zeros first": (bytes(5000) + b"x" * 99, "begins with zeros"),
    "no index": (encode()[: len(encode()) // 2], "index (moov) is missing"),
    "encrypted": (encrypted(), "encrypted"),
    "gif": (b"GIF89a" + bytes(99), "a GIF picture"),
    "zip": (b"PK\x03\x04" + bytes(99), "a zip archive"),
    "sound": (b"RIFF\x24\0\0\0WAVEfmt " + bytes(99), "sound without pictures"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_name_the_cause(name: str) -> None:
    data, cause = MESSAGES[name]
    error = error_of(data)
    assert (error.kind, cause in str(error)) == ("undecodable", True), str(error)


def test_interlaced_and_hdr_videos_have_a_warning() -> None:
    assert probe(encode("mpeg2video", "mpegts", flags="+ilme+ildct", bf=0, rate=25)).warnings == ("interlaced",)
    hdr = encode(pix_fmt="yuv420p10le", x264_params="transfer=smpte2084:colorprim=bt2020:colormatrix=bt2020nc")
    assert probe(hdr).warnings == ("hdr",)
    assert probe(encode()).warnings == ()
