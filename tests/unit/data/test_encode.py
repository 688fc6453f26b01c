import io
import os

import numpy as np
import pytest
from numpy.random import default_rng
from PIL import Image

from ardiff.data.config import SyntheticConfig
from ardiff.data.decode import decode_clip
from ardiff.data.encode import VideoCodec, contact_sheet, encode_video, reencode_mpeg4, tile
from ardiff.data.probe import probe
from ardiff.data.synthetic import render_video
from ardiff.serving.fragments import FragmentWriter

CODECS: list[VideoCodec] = ["h264", "vp9", "av1"]


def smooth_video(num_frames: int, height: int, width: int) -> np.ndarray:
    """Slowly changing colours uint8 (F, H, W, 3) that 4:2:0 keeps."""
    f, y, x = np.meshgrid(np.arange(num_frames), np.arange(height), np.arange(width), indexing="ij")
    channels = [120 + 60 * np.sin(0.05 * (x + c * y) + 0.2 * f + c) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


@pytest.mark.parametrize("codec", CODECS)
def test_round_trip(codec: VideoCodec) -> None:
    frames = smooth_video(12, 64, 96)
    data = encode_video(frames, 12.5, codec, crf=8)
    found = probe(data)
    assert (found.codec, found.width, found.height, found.num_frames) == (codec, 96, 64, 12)
    assert found.fps == pytest.approx(12.5)
    assert psnr(frames, decode_clip(data, 0, 12)) > 40


@pytest.mark.parametrize("codec", CODECS)
def test_equal_frames_give_equal_videos(codec: VideoCodec) -> None:
    frames = smooth_video(12, 32, 32)
    first, second = (decode_clip(encode_video(f, 8, codec), 0, 12) for f in (frames, frames.copy()))
    error = (first.astype(float) - second) ** 2
    assert error.mean() < 1.0


@pytest.mark.parametrize(("codec", "times"), [("h264", 150), ("vp9", 10), ("av1", 5)])
def test_bytes_do_not_depend_on_what_lies_in_memory(codec: VideoCodec, times: int) -> None:
    frames = render_video(SyntheticConfig(), 26, "train")  # narrow and moving: x264's mbtree gave 2 % other bytes
    generator, ballast = default_rng(0), list[np.ndarray]()
    first = encode_video(frames, 8, codec, crf=8)
    for _ in range(times):
        ballast.append(np.full(generator.integers(100, 200_000), generator.integers(256), dtype=np.uint8))
        del ballast[: max(len(ballast) - 40, 0) : 3]
        assert encode_video(frames, 8, codec, crf=8) == first


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="not Linux")
@pytest.mark.parametrize("codec", CODECS)
def test_encoding_leaves_the_thread_its_priority(codec: VideoCodec) -> None:
    before = os.sched_getscheduler(0)
    encode_video(np.zeros((4, 64, 64, 3), np.uint8), 8.0, codec)
    writer = FragmentWriter(64, 64, 8.0, codec)
    writer.start()
    writer.add(np.zeros((64, 64, 3), np.uint8))
    writer.finish()
    assert os.sched_getscheduler(0) == before


def test_smaller_crf_is_better() -> None:
    frames = default_rng(0).integers(0, 255, (4, 32, 32, 1), dtype=np.uint8).repeat(3, axis=-1)
    fine, coarse = (decode_clip(encode_video(frames, 8, crf=crf), 0, 4) for crf in (4, 40))
    assert psnr(frames, fine) > psnr(frames, coarse) + 10


def test_odd_sizes_are_padded_with_the_edge() -> None:
    frames = smooth_video(3, 33, 47)
    decoded = decode_clip(encode_video(frames, 8, crf=4), 0, 3)
    assert decoded.shape == (3, 34, 48, 3)
    assert psnr(frames, decoded[:, :33, :47]) > 38


def test_single_frame() -> None:
    assert probe(encode_video(smooth_video(1, 32, 32), 8)).num_frames == 1


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((2, 8, 8), np.uint8),
        np.zeros((2, 3, 8, 8), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
    ],
)
def test_wrong_frames(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match="frames must be"):
        encode_video(frames, 8)


def test_wrong_fps() -> None:
    with pytest.raises(ValueError, match="fps must be positive"):
        encode_video(smooth_video(2, 8, 8), 0)


def test_contact_sheet_shows_evenly_spaced_frames_enlarged() -> None:
    videos = default_rng(0).integers(0, 255, (2, 9, 8, 6, 3), dtype=np.uint8)
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet(videos, max_frames=3, scale=2, gap=1))))
    assert sheet.shape == (2 * 17 - 1, 3 * 13 - 1, 3)
    for row in range(2):
        for column, frame in enumerate((0, 4, 8)):
            picture = sheet[row * 17 : row * 17 + 16, column * 13 : column * 13 + 12]
            assert np.array_equal(picture, videos[row, frame].repeat(2, axis=0).repeat(2, axis=1))


def test_contact_sheet_labels_stand_in_a_margin() -> None:
    videos = np.full((2, 2, 16, 16, 3), 255, np.uint8)
    plain = np.asarray(Image.open(io.BytesIO(contact_sheet(videos))))
    labelled = np.asarray(Image.open(io.BytesIO(contact_sheet(videos, ["real", "sample"]))))
    margin = labelled.shape[1] - plain.shape[1]
    assert margin > 20
    assert labelled[:, :margin].min() < 64


def test_tile_fills_the_last_row_with_white() -> None:
    videos = default_rng(0).integers(0, 255, (3, 4, 5, 6, 3), dtype=np.uint8)
    tiled = tile(videos, columns=2, gap=1)
    assert tiled.shape == (4, 11, 13, 3)
    assert np.array_equal(tiled[:, :5, 7:], videos[1])
    assert np.array_equal(tiled[:, 6:, :6], videos[2])
    assert (tiled[:, 6:, 7:] == 255).all()


def test_mpeg4_keeps_the_shape_and_loses_a_little() -> None:
    smooth = np.linspace(0, 200, 33)[:, None, None] + np.arange(5)[:, None, None, None] * np.ones((5, 1, 31, 3))
    frames = np.broadcast_to(smooth, (5, 33, 31, 3)).astype(np.uint8)  # odd sizes
    lossy = reencode_mpeg4(frames)
    assert lossy.shape == frames.shape
    assert 0 < np.abs(lossy.astype(int) - frames).mean() < 4
    assert np.array_equal(reencode_mpeg4(frames), lossy)
    with pytest.raises(ValueError, match="frames must be uint8"):
        reencode_mpeg4(frames[0])
