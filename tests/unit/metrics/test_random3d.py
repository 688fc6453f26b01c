from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from ardiff.data.config import SyntheticConfig
from ardiff.data.synthetic import CLASSES, draw_scene, render_scene, render_video
from ardiff.metrics import controls
from ardiff.metrics.frechet import frechet_distance
from ardiff.metrics.networks.random3d import NUM_FEATURES, RandomVideoFeatures, scale_features
from ardiff.resolution import Resolution

CLIPS = 96


def clips(first: int, count: int, seed: int = 0) -> np.ndarray:
    config = SyntheticConfig(num_frames=16, num_long=0, seed=seed)
    return np.stack([render_video(config, index, "test") for index in range(first, first + count)])


def extract(extractor: RandomVideoFeatures, videos: np.ndarray) -> torch.Tensor:
    return torch.cat([extractor(batch) for batch in torch.from_numpy(videos).split(32)])


def pattern() -> torch.Tensor:
    values = np.arange(4 * 20 * 24 * 3, dtype=np.int64) * 7919 % 251
    return torch.from_numpy(values.astype(np.uint8)).reshape(1, 4, 20, 24, 3)


def distances(sets: dict[str, np.ndarray], seed: int) -> dict[str, float]:
    """The distance of each set but the first to the first."""
    extractor = RandomVideoFeatures(seed)
    reference, *features = (extract(extractor, videos) for videos in sets.values())
    scaled = scale_features(reference, reference)
    return {
        name: frechet_distance(scaled, scale_features(reference, values))
        for name, values in zip([*sets][1:], features, strict=True)
    }


def turning(seed: int, first: int, count: int, share: float) -> np.ndarray:
    """Test videos whose shape turns into another one at a share of the frames; position and colour stay as they are."""
    config = SyntheticConfig(num_frames=16, num_long=0, seed=seed)
    generator, videos = np.random.default_rng(seed), []
    for index in range(first, first + count):
        scene = draw_scene(config, index, "test")
        drawn = np.stack(
            [render_scene(Resolution.square(32), replace(scene, shape=shape), scene.centres(16)) for shape in CLASSES]
        )
        steps = generator.integers(1, 4, 16) * (generator.random(16) < share)
        videos.append(drawn[(index + steps.cumsum()) % 4, np.arange(16)])
    return np.stack(videos)


def light_damage(videos: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """As much blur and noise as a good reconstruction has."""
    grain = generator.normal(0.0, 4.0, videos.shape)
    return np.clip(controls.blur(videos, sigma=0.5) + grain, 0, 255).astype(np.uint8)


def check_order(scores: dict[str, float]) -> None:
    near = [(low, high) for low, high in pairwise(scores) if 1.15 * scores[low] >= scores[high]]
    assert not near, {name: scores[name] for pair in near for name in pair}


def test_the_distance_ranks_a_shape_that_turns_into_others_worse_than_jitter():
    generator = np.random.default_rng(0)
    real, other = clips(0, 48), clips(48, 48)
    sets = {"reference": real, "real": other, "light": light_damage(other, generator)}
    sets |= {name: controls.CONTROLS[name](other, generator) for name in ("jitter", "identity flicker")}
    check_order(distances(sets, seed=0))
    third = distances({"reference": real, "a third of the frames": turning(0, 48, 48, 0.34)}, seed=0)
    assert third["a third of the frames"] > distances({"reference": real, "jitter": sets["jitter"]}, seed=0)["jitter"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_distance_ranks_the_controls(seed):
    """The order that the quickstart's report relies on, for five seeds of the data and of the network."""
    generator = np.random.default_rng(seed)
    real, other = clips(0, CLIPS, seed), clips(CLIPS, CLIPS, seed)
    sets = {"reference": real, "real": other, "light": light_damage(other, generator)}
    for name, control in controls.CONTROLS.items():
        sets[name] = np.concatenate([control(other[i : i + 16], generator) for i in range(0, CLIPS, 16)])
    scores = distances(sets, seed)
    # Which comes first depends on the seed: content swap or frozen, shuffled frames or identity flicker.
    assert scores.pop("content swap") > scores["jitter"]
    assert scores["noise"] > scores.pop("shuffled frames") > scores["frozen"]
    check_order(scores)


def test_features_are_these_numbers():
    features = RandomVideoFeatures(seed=0)(pattern())
    assert features.shape == (1, NUM_FEATURES)
    assert features.dtype == torch.float32
    golden = torch.tensor([0.382708, 0.001906, 0.458809, 0.008508, 0.152125, 0.148693])
    torch.testing.assert_close(features[0, [0, 17, 33, 56, 80, 127]], golden, rtol=1e-4, atol=1e-5)


def test_extractor_is_a_function_of_its_seed_alone():
    torch.manual_seed(1)
    first = RandomVideoFeatures(seed=3)
    torch.manual_seed(2)
    again, other = RandomVideoFeatures(seed=3), RandomVideoFeatures(seed=4)
    video = pattern()
    assert torch.equal(first(video), again(video))
    assert not torch.allclose(first(video), other(video), rtol=0.05)
    assert (first.name, other.name) == ("random3d-seed3-v2", "random3d-seed4-v2")
    assert not list(first.parameters())


def test_a_video_has_the_same_features_in_any_batch():
    extractor, videos = RandomVideoFeatures(), torch.from_numpy(clips(0, 5))
    torch.testing.assert_close(extractor(videos)[3:4], extractor(videos[3:4]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 3, 16, 16, 3), (2, 5, 17, 31, 3), (1, 40, 64, 48, 3)])
def test_any_size_of_video(shape):
    video = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = RandomVideoFeatures()(video)
    assert features.shape == (shape[0], NUM_FEATURES)
    assert features.isfinite().all()


def test_features_of_a_still_video():
    """Nothing changes: only the means of the appearance are not zero."""
    still = pattern()[:, :1].repeat(1, 6, 1, 1, 1)
    features = RandomVideoFeatures()(still)[0].reshape(8, 16)  # stream, layer, mean or change
    assert (features[[0, 2]] > 0).all()
    assert features[[1, 3]].max() < 1e-6
    assert (features[4:] == 0).all()


def test_a_shift_by_whole_pixels_changes_no_feature_of_appearance():
    video = torch.full((2, 6, 32, 32, 3), 26, dtype=torch.uint8)
    for frame in range(6):
        for shape, height in enumerate((12, 6)):
            video[shape, frame, 10 : 10 + height, 4 + 2 * frame : 10 + 2 * frame] = 200
    turning = video.clone()
    turning[0, 1::2] = video[1, 1::2]
    moving, flickering = (RandomVideoFeatures()(v)[0, 16:32] for v in (video, turning))  # changes of the first layer
    assert moving.max() < 1e-5
    assert flickering.min() > 1e-3


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(1, 4, 16, 16, 3), "uint8"),
        (torch.zeros(4, 16, 16, 3, dtype=torch.uint8), "uint8"),
        (torch.zeros(1, 4, 3, 16, 16, dtype=torch.uint8), "uint8"),
        (torch.zeros(1, 2, 16, 16, 3, dtype=torch.uint8), "F >= 3"),
        (torch.zeros(1, 3, 15, 16, 3, dtype=torch.uint8), "H, W >= 16"),
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
