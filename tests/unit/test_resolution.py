"""Shapes of frames: how they are written, and how pictures are fitted."""

from typing import Any

import pytest
import yaml

from ardiff.config import build, fingerprint, load_config, to_dict, to_yaml
from ardiff.errors import ConfigError
from ardiff.resolution import Resolution
from ardiff.vae import AutoencoderConfig
from ray_jobs.training.config import TrainVAEConfig


@pytest.mark.parametrize(
    ("written", "expected", "plain"),
    [
        (32, (32, 32), 32),
        ([32, 32], (32, 32), 32),
        ("32", (32, 32), 32),
        ((36, 64), (36, 64), [36, 64]),
        ("36, 64", (36, 64), [36, 64]),
        (Resolution(64, 36), (64, 36), [64, 36]),
    ],
)
def test_a_shape_has_one_spelling(written: Any, expected: tuple[int, int], plain: Any) -> None:
    shape = Resolution.parse(written)
    assert shape == expected
    assert shape.plain == plain
    assert Resolution.parse(shape.plain) == shape
    assert str(shape) == f"{expected[0]}x{expected[1]}"


@pytest.mark.parametrize("written", ["36x64", "", [1, 2, 3], [], None, True, 16.5, "a,b", {"height": 1}])
def test_other_spellings_are_refused(written: Any) -> None:
    with pytest.raises(ValueError, match=r"must be one number or \[height, width\]"):
        Resolution.parse(written)
    with pytest.raises(ConfigError, match=r"'vae\.resolution' must be one number or \[height, width\] in pixels, not"):
        build(AutoencoderConfig, {"resolution": written}, "vae")


def test_configurations_keep_the_shape_and_squares_their_fingerprint() -> None:
    wide = load_config(TrainVAEConfig, None, ["vae.resolution=36,64", "vae.patch_size=4"])
    assert wide == load_config(TrainVAEConfig, None, ["vae.resolution=[36, 64]", "vae.patch_size=4"])
    assert wide.vae.resolution == (36, 64)
    assert build(TrainVAEConfig, yaml.safe_load(to_yaml(wide))) == wide
    assert to_dict(wide)["vae"]["resolution"] == [36, 64]
    square = AutoencoderConfig(resolution=32)  # type: ignore[arg-type]
    assert square == AutoencoderConfig(resolution=Resolution(32, 32))
    assert to_dict(square)["resolution"] == 32
    assert fingerprint(square) == fingerprint(to_dict(square))
    assert fingerprint([Resolution(32, 32)]) == fingerprint([32])
    assert fingerprint(AutoencoderConfig()) == "69be7409ffb72156"  # as before rectangles existed
    tall = AutoencoderConfig(resolution=Resolution(64, 32))
    assert fingerprint(tall) != fingerprint(AutoencoderConfig(resolution=Resolution(32, 64)))


@pytest.mark.parametrize(
    ("shape", "picture", "expected"),
    [
        ((32, 32), (64, 48), (2 / 3, 43, 32)),
        ((36, 64), (1920, 1080), (1 / 30, 64, 36)),
        ((36, 64), (640, 480), (0.1, 64, 48)),
        ((36, 64), (480, 640), (64 / 480, 64, 85)),
        ((64, 36), (480, 640), (0.1, 48, 64)),
        ((36, 64), (30, 20), (64 / 30, 64, 43)),
    ],
)
def test_a_picture_just_covers_the_frame(shape: Any, picture: tuple[int, int], expected: Any) -> None:
    assert Resolution(*shape).covering(*picture) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shape", "room", "expected"),
    [((1, 1), (48, 64), (48, 48)), ((36, 64), (480, 640), (360, 640)), ((64, 36), (480, 640), (480, 270))],
)
def test_the_largest_region_of_a_shape(shape: Any, room: tuple[int, int], expected: tuple[int, int]) -> None:
    assert Resolution(*shape).largest_in(*room) == expected
