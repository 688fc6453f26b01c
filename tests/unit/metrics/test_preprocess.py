"""Ways to resize frames: Pillow's filter, sampling by hand, what peers feed their networks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ardiff.metrics.networks.resnet3d import MEAN_RGB
from ardiff.metrics.preprocess import Range, Resize, resize_frames, scale_range
from ardiff.resolution import Resolution

EXPECTED = json.loads((Path(__file__).parents[2] / "golden" / "metrics" / "preprocess_fixtures.json").read_text())


def frames(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).randint(0, 256, (2, height, width, 3)).astype(np.uint8))


@pytest.mark.parametrize(("height", "width", "size"), [(256, 256, 224), (240, 320, 112), (64, 64, 299), (37, 50, 224)])
def test_bicubic_is_pillows_on_floating_point_channels(height: int, width: int, size: int) -> None:
    video = frames(height, width)

    def pillow(channel: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(channel.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC))

    expected = np.stack([[pillow(f[..., c]) for c in range(3)] for f in video.numpy()])
    resized = resize_frames(video, Resolution.square(size), "bicubic-antialias")
    np.testing.assert_allclose(resized.numpy(), expected, atol=1e-4)  # of 0 to 255
    assert not torch.equal(resized, resized.round())
    assert size == 112 or resized.min() < 0  # nor clipped; there, noise is averaged away


def ramp(height: int, width: int) -> torch.Tensor:
    """Ramps of another direction in each channel, brighter with every frame, cut at white."""
    t, y, x, c = np.ogrid[:2, :height, :width, :3]
    values = ((3 - c) * x + (1 + c) * y) // 4 + 5 * t
    return torch.from_numpy(values.clip(0, 255).astype(np.uint8))


PEERS: dict[str, tuple[int, Resize, Range]] = {
    "authors_i3d_224": (224, "bicubic-antialias", "[-1, 1]"),
    "authors_resnet3d_112": (112, "bicubic-antialias", "minus mean RGB"),
    "authors_cleanfid_299": (299, "bicubic-antialias", "(x - 128) / 128"),
    "cdfvd_tats_224": (224, "bilinear", "[-1, 1]"),
    "videogpt_224": (224, "bilinear", "[-1, 1]"),
    "tf1_legacy_bilinear_224": (224, "tf-bilinear", "[-1, 1]"),
    "torchfidelity_299": (299, "tf-bilinear", "(x - 128) / 128"),
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", EXPECTED["cases"])
def test_networks_see_what_those_of_the_peers_see(peer: str, case: str) -> None:
    if peer == "videogpt_224" and case.endswith("240x320"):
        pytest.skip("VideoGPT crops frames that are not square, which no protocol here does")
    expected = EXPECTED["cases"][case][peer]
    size, how, value_range = PEERS[peer]
    seen = scale_range(
        resize_frames(peer_frames(case), Resolution.square(size), how), value_range, MEAN_RGB
    )  # (2, 3, S, S)
    assert [3, 2, *seen.shape[2:]] == expected["shape"]
    scale, middle = 127.5 if value_range == "minus mean RGB" else 1.0, slice(size // 2, size // 2 + 2)
    np.testing.assert_allclose(seen[0, 0, :4, :4], expected["corner_c0_t0_4x4"], atol=2e-6 * scale)
    np.testing.assert_allclose(seen[1, 1, middle, middle], expected["centre_c1_t1_2x2"], atol=2e-6 * scale)
    for statistic in ("mean", "std", "min", "max"):
        value = seen.double().std(correction=0) if statistic == "std" else getattr(seen.double(), statistic)()
        assert float(value) == pytest.approx(expected[statistic], abs=2e-6 * scale), statistic


@pytest.mark.parametrize("case", EXPECTED["cases"])
def test_ways_to_resize_differ_by_what_those_of_the_peers_differ(case: str) -> None:
    others: dict[str, Resize] = {"authors_vs_cdfvd": "bicubic-antialias", "tf1_vs_cdfvd": "tf-bilinear"}
    for pair, how in others.items():
        one, other = (
            resize_frames(peer_frames(case), Resolution.square(224), w).double() / 127.5 for w in (how, "bilinear")
        )
        assert float((one - other).square().mean().sqrt()) == pytest.approx(
            EXPECTED["cases"][case]["rms_diff_224"][pair], rel=1e-4
        )


def peer_frames(case: str) -> torch.Tensor:
    kind, _, size = case.partition("_")
    height, width = map(int, size.split("x"))
    return ramp(height, width) if kind == "ramp" else frames(height, width, seed=41)


@pytest.mark.parametrize("how", ["bilinear", "tf-bilinear"])
def test_bilinear_samples_where_it_should(how: Resize) -> None:
    video, size = frames(10, 14), 7
    resized = resize_frames(video, Resolution.square(size), how).numpy()
    offset = 0.5 if how == "bilinear" else 0.0
    for i in range(size):
        for j in range(size):
            y, x = ((k + offset) * n / size - offset for k, n in ((i, 10), (j, 14)))
            y0, x0 = int(np.floor(y)), int(np.floor(x))
            pixels = video.numpy().astype(np.float64)
            rows = [min(max(y0 + d, 0), 9) for d in (0, 1)]
            columns = [min(max(x0 + d, 0), 13) for d in (0, 1)]
            value = sum(
                wy * wx * pixels[:, r, c]
                for r, wy in zip(rows, (1 - (y - y0), y - y0), strict=True)
                for c, wx in zip(columns, (1 - (x - x0), x - x0), strict=True)
            )
            np.testing.assert_allclose(resized[:, :, i, j], value, atol=1e-3)


def test_pixels_of_the_right_size_are_left_alone() -> None:
    video = frames(224, 224)
    for how in ("bilinear", "tf-bilinear", "bicubic-antialias"):
        assert torch.equal(resize_frames(video, Resolution.square(224), how).byte(), video.permute(0, 3, 1, 2))  # type: ignore[arg-type]


def test_ranges() -> None:
    pixels = torch.tensor([0.0, 127.5, 255.0]).expand(1, 3, 3).transpose(1, 2)[..., None]  # (1, 3, 3, 1)
    assert scale_range(pixels, "[-1, 1]").flatten()[[0, 3, 6]].tolist() == [-1.0, 0.0, 1.0]
    assert scale_range(pixels, "(x - 128) / 128").min() == -1.0
    assert scale_range(pixels, "minus mean RGB", (1.0, 2.0, 3.0)).flatten()[[0, 3, 6]].tolist() == [-1.0, 125.5, 252.0]


def test_what_cannot_be_resized() -> None:
    with pytest.raises(ValueError, match="expected uint8 frames"):
        resize_frames(frames(8, 8).float(), Resolution.square(4), "bilinear")
    with pytest.raises(ValueError, match="unknown resize method"):
        resize_frames(frames(8, 8), Resolution.square(4), "nearest")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown range"):
        scale_range(torch.zeros(1, 3, 2, 2), "[0, 2]")  # type: ignore[arg-type]
