from itertools import pairwise

import numpy as np
import pytest
import torch

from ardiff.data.config import SyntheticConfig
from ardiff.data.synthetic import render_video
from ardiff.metrics import controls
from ardiff.metrics.frechet import frechet_distance
from ardiff.metrics.networks.random3d import NUM_FEATURES, RandomVideoFeatures, scale_features

CLIPS = 96


def clips(first: int, count: int) -> np.ndarray:
    config = SyntheticConfig(num_frames=16, num_long=0)
    return np.stack([render_video(config, index, "test") for index in range(first, first + count)])


def extract(extractor: RandomVideoFeatures, videos: np.ndarray) -> torch.Tensor:
    return torch.cat([extractor(batch) for batch in torch.from_numpy(videos).split(32)])


def pattern() -> torch.Tensor:
    values = np.arange(4 * 20 * 24 * 3, dtype=np.int64) * 7919 % 251
    return torch.from_numpy(values.astype(np.uint8)).reshape(1, 4, 20, 24, 3)


def test_distance_ranks_the_controls():
    """The order that the quickstart's report relies on; the first row is two sets of real clips."""
    generator = np.random.default_rng(0)
    real, other = clips(0, CLIPS), clips(CLIPS, CLIPS)
    grain = generator.normal(0.0, 4.0, other.shape)
    light = np.clip(controls.blur(other, sigma=0.5) + grain, 0, 255).astype(np.uint8)
    sets = {"real": other, "light blur and noise": light}
    sets |= {name: control(other, generator) for name, control in controls.CONTROLS.items()}
    extractor = RandomVideoFeatures()
    reference = extract(extractor, real)
    scores = {
        name: frechet_distance(
            scale_features(reference, reference), scale_features(reference, extract(extractor, videos))
        )
        for name, videos in sets.items()
    }
    values = list(scores.values())
    assert all(1.15 * lower < higher for lower, higher in pairwise(values)), scores


def test_features_are_these_numbers():
    features = RandomVideoFeatures(seed=0)(pattern())
    assert features.shape == (1, NUM_FEATURES)
    assert features.dtype == torch.float32
    golden = torch.tensor([0.390487, 0.435220, 0.294936, 0.635621, 0.376485, 0.382447])
    torch.testing.assert_close(features[0, [0, 1, 24, 56, 80, 111]], golden, rtol=1e-4, atol=1e-5)


def test_extractor_is_a_function_of_its_seed_alone():
    torch.manual_seed(1)
    first = RandomVideoFeatures(seed=3)
    torch.manual_seed(2)
    again, other = RandomVideoFeatures(seed=3), RandomVideoFeatures(seed=4)
    video = pattern()
    assert torch.equal(first(video), again(video))
    assert not torch.allclose(first(video), other(video), rtol=0.05)
    assert (first.name, other.name) == ("random3d-seed3-v1", "random3d-seed4-v1")
    assert not list(first.parameters())


def test_a_video_has_the_same_features_in_any_batch():
    extractor, videos = RandomVideoFeatures(), torch.from_numpy(clips(0, 5))
    torch.testing.assert_close(extractor(videos)[3:4], extractor(videos[3:4]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 2, 16, 16, 3), (2, 5, 17, 31, 3), (1, 40, 64, 48, 3)])
def test_any_size_of_video(shape):
    video = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = RandomVideoFeatures()(video)
    assert features.shape == (shape[0], NUM_FEATURES)
    assert features.isfinite().all()


def test_motion_features_of_a_still_video_are_zero():
    still = pattern()[:, :1].repeat(1, 6, 1, 1, 1)
    features = RandomVideoFeatures()(still)[0]
    assert (features[NUM_FEATURES // 2 :] == 0).all()
    assert (features[: NUM_FEATURES // 2] > 0).all()


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(1, 4, 16, 16, 3), "uint8"),
        (torch.zeros(4, 16, 16, 3, dtype=torch.uint8), "uint8"),
        (torch.zeros(1, 4, 3, 16, 16, dtype=torch.uint8), "uint8"),
        (torch.zeros(1, 1, 16, 16, 3, dtype=torch.uint8), "F >= 2"),
        (torch.zeros(1, 2, 15, 16, 3, dtype=torch.uint8), "H, W >= 16"),
    ],
)
def test_bad_videos_are_refused(video, message):
    with pytest.raises(ValueError, match=message):
        RandomVideoFeatures()(video)


def test_scaling_by_the_reference():
    reference = torch.tensor([[0.0, 0.0, 5.0], [2.0, 4.0, 5.0]])  # spreads 1, 2, 0, their mean 1
    scaled = scale_features(reference, torch.tensor([[1.0, 2.0, 6.0], [2.1, 4.1, 5.0]]))
    expected = torch.tensor([[0.0, 0.0, 10.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(scaled, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("reference", "features", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 3), r"\(N, D\)"),
        (torch.zeros(3), torch.zeros(3, 3), r"\(N, D\)"),
        (torch.zeros(1, 2), torch.zeros(3, 2), "2 rows"),
        (torch.ones(3, 2), torch.zeros(3, 2), "does not vary"),
        (torch.full((3, 2), torch.nan), torch.zeros(3, 2), "does not vary"),
    ],
)
def test_bad_references_are_refused(reference, features, message):
    with pytest.raises(ValueError, match=message):
        scale_features(reference, features)
