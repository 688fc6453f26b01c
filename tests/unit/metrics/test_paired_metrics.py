"""PSNR and SSIM against torchmetrics, and the measurement of pairs."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from ardiff.errors import DataError
from ardiff.metrics.networks.lpips import LPIPS
from ardiff.metrics.paired import PairMeasure
from ardiff.metrics.pairs.psnr import MAX_PSNR, frame_psnr, psnr
from ardiff.metrics.pairs.ssim import ssim, ssim_grey
from ardiff.metrics.registry import PairedMetric, find_metric


def pair(strength: float, frames: int = 3, height: int = 40, width: int = 52) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    smooth = generator.normal(size=(frames, height, width, 3)).cumsum(axis=1).cumsum(axis=2)
    original = 128 + 60 * smooth / np.abs(smooth).max()
    noisy = original + strength * generator.normal(size=original.shape)
    return original.clip(0, 255).astype(np.uint8), noisy.clip(0, 255).astype(np.uint8)


def tensors(*videos: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(video).permute(0, 3, 1, 2).double() for video in videos]


@pytest.mark.parametrize("strength", [1.0, 10.0, 80.0])
def test_ssim_is_that_of_torchmetrics(strength: float) -> None:
    original, other = pair(strength)
    _, places = structural_similarity_index_measure(*tensors(other, original), data_range=255.0, return_full_image=True)
    whole = places[..., 5:-5, 5:-5]  # its other windows reach over the border, into a reflection
    assert ssim(original, other) == pytest.approx(float(whole.mean()), abs=1e-6)


def test_psnr_by_hand():
    a = np.zeros((2, 4, 4), dtype=np.uint8)
    b = a.copy()
    b[0, 0, 0] = 255  # mean squared error 255^2 / 16 in the first, 0 in the second
    assert psnr(a, b) == pytest.approx(10 * np.log10(32))
    assert [psnr(x, y) for x, y in zip(a, b, strict=True)] == pytest.approx([10 * np.log10(16), np.inf])
    assert psnr(b, a) == psnr(a, b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.zeros(3, np.uint8), np.zeros(4, np.uint8)),
        (np.zeros(3), np.zeros(3)),
        (np.zeros(0, np.uint8), np.zeros(0, np.uint8)),
    ],
)
def test_psnr_refuses_other_arrays(a, b):
    with pytest.raises(ValueError, match="uint8 arrays of one shape"):
        psnr(a, b)


@pytest.mark.parametrize("strength", [1.0, 10.0, 80.0])
def test_psnr_is_that_of_torchmetrics(strength: float) -> None:
    original, other = pair(strength)
    frames = zip(*tensors(other, original), strict=True)
    expected = [float(peak_signal_noise_ratio(x, y, data_range=255.0)) for x, y in frames]
    assert frame_psnr(original, other) == pytest.approx(np.mean(expected), abs=1e-4)


def test_equal_videos() -> None:
    original, _ = pair(1.0)
    assert ssim(original, original) == pytest.approx(1.0)
    assert frame_psnr(original, original) == MAX_PSNR
    half = original.copy()
    half[0] ^= 255
    assert np.isfinite(frame_psnr(original, half))


def test_what_cannot_be_measured() -> None:
    small = np.zeros((2, 10, 20, 3), np.uint8)
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(small, small)
    with pytest.raises(ValueError, match="of one shape"):
        frame_psnr(small, small[:1])


def test_pairs_are_measured_one_by_one() -> None:
    cpu = torch.device("cpu")
    (original, close), (_, far) = pair(2.0), pair(40.0)
    pairs = np.stack([np.stack([original, close]), np.stack([original, far])])
    model, generator = LPIPS("alex"), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.rand(parameter.shape, generator=generator) * 0.02
    metrics = [metric for name in ("psnr", "ssim", "lpips") if isinstance(metric := find_metric(name), PairedMetric)]
    measure = PairMeasure(metrics, {"lpips-alex": model.state_dict()}, cpu)
    values = measure(pairs)
    assert values.shape == (2, 1, 3)
    assert values[:, 0, 0].tolist() == pytest.approx([frame_psnr(original, v) for v in (close, far)], rel=1e-6)
    assert values[:, 0, 1].tolist() == pytest.approx([ssim(original, v) for v in (close, far)], rel=1e-6)
    assert 0 < values[0, 0, 2] < values[1, 0, 2]
    x, y = (t.float() / 127.5 - 1 for t in tensors(original, far))
    assert values[1, 0, 2] == pytest.approx(float(model(x, y).mean()), rel=1e-5)
    without = PairMeasure(metrics[:2], {}, cpu)
    assert np.array_equal(without(pairs), values[..., :2])
    with pytest.raises(DataError, match="52x20, too small: lpips needs at least 32"):
        measure(pairs[:, :, :, :20])
    with pytest.raises(DataError, match="too small: ssim needs at least 11"):
        without(pairs[:, :, :, :8])


def test_ssim_grey_is_that_of_windows_one_by_one() -> None:
    """The defaults of scikit-image, window by window: 7x7 pixels, even weights, unbiased variances."""
    original, other = (v[:2, :16, :12] for v in pair(30.0))
    weights, values = np.array([0.299, 0.587, 0.114]), []
    for a, b in zip(original, other, strict=True):
        x, y = (a @ weights).round(), (b @ weights).round()
        for top in range(10):
            for left in range(6):
                u, v = (z[top : top + 7, left : left + 7].ravel() for z in (x, y))
                (var_u, cov), (_, var_v) = np.cov(u, v)
                c1, c2 = 2.55**2, 7.65**2
                value = (2 * u.mean() * v.mean() + c1) * (2 * cov + c2)
                values.append(value / ((u.mean() ** 2 + v.mean() ** 2 + c1) * (var_u + var_v + c2)))
    assert ssim_grey(original, other) == pytest.approx(np.mean(values), rel=1e-9)
    assert ssim_grey(original, original) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="at least 7 pixels"):
        ssim_grey(original[:, :6], other[:, :6])
