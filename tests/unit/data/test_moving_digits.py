"""Moving MNIST: digits of files, their motion, and files that are no digits."""

import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ardiff.data import moving_digits
from ardiff.data.config import MovingDigitsConfig
from ardiff.data.decode import decode_clip
from ardiff.data.moving_digits import read_digits, render, split_digits, trajectory, write_video
from ardiff.errors import DataError
from ardiff.randomness import numpy_generator

CONFIG = MovingDigitsConfig()


def digits(count: int = 20, side: int = 28) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 256, (count, side, side), dtype=np.uint8)


def idx(images: np.ndarray) -> bytes:
    return b"\0\0\x08\x03" + np.array(images.shape, dtype=">u4").tobytes() + images.tobytes()


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def saved(folder: Path, data: bytes) -> str:
    (folder / "digits").write_bytes(data)
    return str(folder / "digits")


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("form", [idx, npy, lambda images: npz(images=images), lambda images: npy(images / 255.0)])
def test_digits_of_every_format(form: Any, pack: Any, tmp_path: Path) -> None:
    assert np.array_equal(read_digits(saved(tmp_path, pack(form(digits()))), 28), digits())


def test_digits_of_another_size_are_scaled(tmp_path: Path) -> None:
    """As those of scikit-learn: 8 x 8 pixels from 0 to 16."""
    images = np.zeros((3, 8, 8))
    images[:, :, 4:] = 16.0
    read = read_digits(saved(tmp_path, npy(images)), 28)
    assert (read.shape, read.dtype) == ((3, 28, 28), np.uint8)
    assert read[:, :, :10].max() < 10
    assert read[:, :, -10:].min() > 245


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"text", "neither an IDX file of images nor an array"),
        (b"", "neither an IDX file of images nor an array"),
        (npy(np.array([{}], dtype=object)), "without pickle"),
        (npz(a=digits(), b=digits()), "holds the arrays a, b: save the digits alone"),
        (npz(a=digits())[:200], "neither an IDX file of images nor an array"),
        (idx(digits())[:-1], "should have 15696 bytes, but has 15695"),
        (gzip.compress(idx(digits()))[:-9], "cannot be decompressed"),
        (npy(digits()[0]), "digits are numbers (digits, height, width)"),
        (npy(digits().astype(str)), "digits are numbers (digits, height, width)"),
        (npy(np.zeros((2, 1, 513), np.uint8)), "more than 512 a side"),
        (npy(np.full((2, 4, 4), np.nan)), "has values from nan to nan"),
        (npy(-digits().astype(float)), "pixels are finite, from 0"),
        (npy(np.zeros((2, 4, 4))), "has values from 0.0 to 0.0"),
    ],
)
def test_what_is_wrong_with_a_file(data: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_digits(saved(tmp_path, data), 28)
    assert reason in str(error.value)


@pytest.mark.parametrize("pack", [idx, lambda images: gzip.compress(idx(images)), lambda images: npz(images=images)])
def test_the_content_of_a_file_is_limited(pack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving_digits, "MAX_BYTES", 20 * 28 * 28)
    images = np.zeros((30, 28, 28), np.uint8)
    with pytest.raises(DataError, match="of data: take fewer digits"):
        read_digits(saved(tmp_path, pack(images)), 28)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(DataError, match=r"no file of digits nowhere/digits\.gz"):
        read_digits("nowhere/digits.gz", 28)


def test_test_digits_are_in_no_training_video(tmp_path: Path) -> None:
    images = np.repeat(np.arange(1, 26, dtype=np.uint8), 28 * 28).reshape(25, 28, 28)
    path = saved(tmp_path, npy(images))
    splits = split_digits(CONFIG, path, None)
    assert [len(splits["train"]), len(splits["test"])] == [22, 3]
    assert not set(splits["train"][:, 0, 0]) & set(splits["test"][:, 0, 0])
    (tmp_path / "others").write_bytes(idx(digits(7)))
    splits = split_digits(CONFIG, path, str(tmp_path / "others"))
    assert [len(splits["train"]), len(splits["test"])] == [25, 7]


def test_one_digit_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds one digit: both splits need digits of their own"):
        split_digits(CONFIG, saved(tmp_path, npy(digits(1))), None)


def test_a_digit_moves_at_constant_speed_and_turns_around_at_the_edges() -> None:
    config = MovingDigitsConfig(num_frames=200)
    free, step = 64 - 28, 0.1 * (64 - 28)
    for seed in range(20):
        path = trajectory(config, numpy_generator("test", seed)).astype(float)  # (F, 2)
        assert path.min() == 0
        assert path.max() == free
        inside = ((path[:-1] > 0) & (path[:-1] < free) & (path[1:] > 0) & (path[1:] < free)).all(axis=1)
        lengths = np.linalg.norm(np.diff(path, axis=0), axis=1)[inside]
        assert np.abs(lengths - step).max() < 2**0.5  # whole pixels


def test_overlapping_digits_show_the_brighter_pixel() -> None:
    config = MovingDigitsConfig(digits_per_video=40, num_frames=2)
    frames = render(config, np.full((1, 28, 28), 200, np.uint8), 0, "train")
    assert set(np.unique(frames)) <= {0, 200}
    assert (frames == frames[..., :1]).all()


def test_videos_depend_on_seed_split_and_index() -> None:
    same = render(CONFIG, digits(), 3, "test")
    assert same.shape == (20, 64, 64, 3)
    assert np.array_equal(same, render(CONFIG, digits(), 3, "test"))
    for other in (
        render(CONFIG, digits(), 4, "test"),
        render(CONFIG, digits(), 3, "train"),
        render(MovingDigitsConfig(seed=1), digits(), 3, "test"),
    ):
        assert not np.array_equal(same, other)


def test_files_lose_less_than_the_rounding_of_luma(tmp_path: Path) -> None:
    record = write_video(CONFIG, digits(), str(tmp_path), 5, "train")
    assert record.uri.endswith("train/digits/train_00005.mp4")
    decoded = decode_clip(Path(record.uri).read_bytes(), 0, 20)
    expected = render(CONFIG, digits(), 5, "train")
    assert np.abs(decoded.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("change", [{"num_test": 0}, {"digit_side": 64}, {"frame_side": 65}, {"speed": 0}, {"fps": 0}])
def test_settings_that_draw_nothing_are_errors(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        MovingDigitsConfig(**change)
