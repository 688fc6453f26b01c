"""PSNR and SSIM against torchmetrics, and measures of pairs."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from ardiff.errors import DataError
from ardiff.metrics.lpips import LPIPS
from ardiff.metrics.pairs import PairMeasure, resampled_mean
from ardiff.metrics.quality import MAX_PSNR, frame_psnr, ssim


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
    values = PairMeasure(model.state_dict(), cpu)(pairs)
    assert values.shape == (2, 1, 3)
    assert values[:, 0, 0].tolist() == pytest.approx([frame_psnr(original, v) for v in (close, far)], rel=1e-6)
    assert values[:, 0, 1].tolist() == pytest.approx([ssim(original, v) for v in (close, far)], rel=1e-6)
    assert 0 < values[0, 0, 2] < values[1, 0, 2]
    x, y = (t.float() / 127.5 - 1 for t in tensors(original, far))
    assert values[1, 0, 2] == pytest.approx(float(model(x, y).mean()), rel=1e-5)
    without = PairMeasure(None, cpu)
    assert np.array_equal(without(pairs), values[..., :2])
    with pytest.raises(DataError, match="52x20, too small: at least 32 a side"):
        PairMeasure(model.state_dict(), cpu)(pairs[:, :, :, :20])
    with pytest.raises(DataError, match="too small: at least 11"):
        without(pairs[:, :, :, :8])


def test_resampled_means_spread_as_means_do() -> None:
    values = np.random.default_rng(0).normal(size=200)
    means = [resampled_mean(values, 0, i) for i in range(300)]
    assert np.mean(means) == pytest.approx(values.mean(), abs=0.02)
    assert np.std(means) == pytest.approx(values.std() / np.sqrt(200), rel=0.15)
