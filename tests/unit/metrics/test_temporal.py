"""Temporal consistency: how much frames change compared with those of real videos."""

import numpy as np
import pytest
import torch

from ardiff.data.config import SyntheticConfig
from ardiff.data.synthetic import render_video
from ardiff.errors import ConfigError, DataError
from ardiff.metrics import controls
from ardiff.metrics.extractors import FeatureExtractor
from ardiff.metrics.features import VideoFeatures
from ardiff.metrics.registry import find_metric, find_spec
from ardiff.metrics.temporal import ChangeRatio
from ardiff.metrics.weights import WeightsConfig, find_state, run
from ray_jobs.evaluation.config import EvaluateConfig

METRICS = ("frame-difference", "frame-second-difference")


def test_ratios_of_known_curves() -> None:
    """One feature of two videos: a line has no second differences, and twice the steps have twice the change."""
    line, zigzag = np.arange(5.0), np.array([0.0, 1.0, 0.0, 1.0, 0.0])
    real = np.stack([line, zigzag])[..., None]  # both change by 1 per frame
    assert ChangeRatio(1)(real, real) == pytest.approx(1.0)
    assert ChangeRatio(1)(real, 2 * real) == pytest.approx(2.0)
    assert ChangeRatio(1)(real, 2 * real[:1]) == pytest.approx(2.0)
    assert ChangeRatio(1)(real, np.ones_like(real)) == 0.0
    assert ChangeRatio(2)(real, real[1:]) == pytest.approx(2.0)  # the mean of real videos is (0 + 2) / 2
    assert ChangeRatio(2)(real, real[:1]) == 0.0


def test_features_count_by_how_much_real_frames_vary_and_blocks_do_not_matter() -> None:
    real = np.random.default_rng(0).normal(size=(6, 8, 3))
    fake = 1.5 * real[:4] + 1.0
    scale = np.array([1.0, 100.0, 0.01])
    expected = ChangeRatio(1)(real, fake)
    assert expected == pytest.approx(1.5, rel=0.2)
    np.testing.assert_allclose(ChangeRatio(1)(1000 * real, 1000 * fake), expected)
    assert ChangeRatio(1)(real * scale, fake * scale) != pytest.approx(ChangeRatio(1)(real * scale, real), rel=0.1)
    blocks = VideoFeatures.of(lambda: [real[:2], real[2:5], real[5:]], 6)
    assert ChangeRatio(1)(blocks, fake) == pytest.approx(expected)


def test_bad_features_are_refused() -> None:
    real = np.random.default_rng(0).normal(size=(3, 4, 2))
    with pytest.raises(ValueError, match="order must be 1 or 2"):
        ChangeRatio(3)
    with pytest.raises(ValueError, match="more than 2 frames"):
        ChangeRatio(2)(real, real[:, :2])
    with pytest.raises(ValueError, match="expected features"):
        ChangeRatio(1)(real, real[..., :1])
    with pytest.raises(DataError, match="do not change"):
        ChangeRatio(1)(np.repeat(real[:, :1], 4, axis=1), real)


@pytest.fixture(scope="module")
def features() -> dict[str, np.ndarray]:
    config, generator = SyntheticConfig(num_frames=8, num_long=0), np.random.default_rng(0)
    videos = np.stack([render_video(config, index, "test") for index in range(24)])
    sets = {"real": videos[:12], "other": videos[12:], "jitter": controls.jitter(videos[12:], generator)}
    sets |= {"frozen": controls.frozen(videos[12:], generator)}
    sets |= {"flicker": controls.identity_flicker(videos, generator)[12:]}
    extractor = FeatureExtractor(
        find_spec("styleganv", "frame-difference"), find_state("random-frames")[0], torch.device("cpu")
    )
    return {name: extractor(clips) for name, clips in sets.items()}


@pytest.mark.parametrize("name", METRICS)
def test_flicker_is_seen_without_labels_or_weights(name: str, features: dict[str, np.ndarray]) -> None:
    distance = find_spec("styleganv", name).distance
    scores = {key: distance(features["real"], values) for key, values in features.items()}
    assert features["real"].shape == (12, 8, 32)
    assert 0.75 < scores["other"] < 1.3, scores
    assert scores["jitter"] < 2.0
    assert scores["flicker"] > 4 * scores["jitter"]
    assert scores["frozen"] == 0.0


def test_scores_near_1_are_best_in_tables() -> None:
    metric = find_metric("frame-difference")
    assert sorted([4.0, 0.0, 1.1, 0.5], key=metric.rank) == [1.1, 0.5, 4.0, 0.0]
    assert metric.advice == "closer to 1 is better"
    assert find_metric("fvd").advice == "lower is better"
    assert sorted([0.2, 0.9], key=find_metric("frame identity").rank) == [0.9, 0.2]


def test_the_network_needs_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    (state, sha256), (_, again) = find_state("random-frames"), find_state("random-frames")
    assert (len(state), sha256) == (2, again)
    config = EvaluateConfig(metrics=METRICS)
    assert list(config.networks) == ["random-frames"]
    run(WeightsConfig(action="list"))
    assert "random-frames" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match="Give one of i3d, lpips-alex, lpips-vgg, text-minilm: ardiff"):
        run(WeightsConfig(action="fetch", name="random-frames"))
