"""The feature networks with rule-filled weights against the outputs of the public implementations."""

import hashlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ardiff.metrics.features import I3D
from ardiff.metrics.networks.inception import FIDInception
from ardiff.metrics.networks.resnet3d import ResNet3D50
from ardiff.metrics.preprocess import resize_frames, scale_range

GOLDEN = Path(__file__).parents[2] / "golden" / "metrics"
EXPECTED = json.loads((GOLDEN / "net_fixtures.json").read_text())
OUTPUTS = np.load(GOLDEN / "net_outputs.npz")


def rules() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fill_rules", GOLDEN / "fill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RULES = rules()


def slow(value: str) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


def filled(model: nn.Module, name: str) -> nn.Module:
    """The model with the weights that the rule gives; they must be all of its own, and no others."""
    expected = EXPECTED[name]
    arrays = RULES.fill(expected["state_shapes"], expected["seed"])
    digest = hashlib.sha256()
    for key in sorted(arrays):
        digest.update(key.encode() + arrays[key].tobytes())
    assert digest.hexdigest() == expected["state_sha256"]
    model.load_state_dict({key: torch.from_numpy(array) for key, array in arrays.items()}, strict=True)
    return model.eval()


def clip(run: dict[str, Any]) -> Tensor:
    array = RULES.clip(run["clip_seed"], run["clip_shape"])
    assert hashlib.sha256(array.tobytes()).hexdigest() == run.get("clip_sha256", hashlib.sha256(array).hexdigest())
    return torch.from_numpy(array)


@pytest.fixture(scope="module")
def i3d() -> I3D:
    model = filled(I3D(), "i3d")
    assert isinstance(model, I3D)
    return model


@pytest.mark.parametrize("length", ["T10", "T16", "T17", slow("T32"), slow("T64")])
@torch.no_grad()
def test_i3d_is_that_of_the_public_port(i3d: I3D, length: str) -> None:
    video = clip(EXPECTED["i3d"]["runs"][length])
    logits = i3d.logits_in_time(video)
    assert torch.allclose(logits[0], torch.from_numpy(OUTPUTS[f"i3d_{length}_piergiaj_logits_time"]), rtol=0, atol=1e-4)
    # The mean over time is what forward gives, and the original graph, but not a port with another epsilon.
    mean = logits.mean(dim=2)[0]
    assert torch.allclose(mean, torch.from_numpy(OUTPUTS[f"i3d_{length}_tfhub_style_logits400"]), rtol=0, atol=1e-4)
    assert (mean - torch.from_numpy(OUTPUTS[f"i3d_{length}_cdfvd_logits400"])).abs().max() > 0.05


@pytest.mark.parametrize("length", ["T16", "T17", slow("T64")])
@torch.no_grad()
def test_i3d_of_the_authors_pools_each_time_step(i3d: I3D, length: str) -> None:
    model = I3D(pool_frames=1).eval()
    model.load_state_dict(i3d.state_dict())
    video = clip(EXPECTED["i3d"]["runs"][length])
    expected = torch.from_numpy(OUTPUTS[f"i3d_{length}_authors_logits400"])
    assert torch.allclose(model(video)[0], expected, rtol=0, atol=1e-4)
    original = torch.from_numpy(OUTPUTS[f"i3d_{length}_tfhub_style_logits400"])
    assert torch.allclose(expected, original, atol=1e-4) == (length == "T16")


@torch.no_grad()
def test_i3d_gives_its_pooled_features_too(i3d: I3D) -> None:
    run = EXPECTED["i3d"]["runs"]["T10"]
    expected = torch.from_numpy(OUTPUTS["i3d_T10_piergiaj_pool1024_time"])
    assert torch.allclose(i3d.pooled_in_time(clip(run))[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("length", ["T16", "T32"])
@torch.no_grad()
def test_resnet3d(length: str) -> None:
    run = EXPECTED["resnet3d50"]["runs"][length]
    features = filled(ResNet3D50(), "resnet3d50")(clip(run) * run["clip_scale"])
    expected = torch.from_numpy(OUTPUTS[f"resnet3d50_{length}_pool2048"])  # of mean 14691 and 32571, some are 0
    assert torch.allclose(features[0], expected, rtol=1e-4, atol=0.1)


@pytest.mark.parametrize(("size", "seed"), [(64, 31), (256, 32), (299, 33)])
@torch.no_grad()
def test_inception(size: int, seed: int) -> None:
    model = filled(FIDInception(), "inception_v3_fid")
    assert isinstance(model, FIDInception)
    assert f"RandomState({seed})" in EXPECTED["inception_v3_fid"]["runs"][str(size)]["image_rule"]
    images = np.random.RandomState(seed).randint(0, 256, size=(2, 3, size, size)).astype(np.uint8)
    pixels = resize_frames(torch.from_numpy(images.transpose(0, 2, 3, 1).copy()), 299, "tf-bilinear")
    inputs = scale_range(pixels, "(x - 128) / 128")
    expected = {width: torch.from_numpy(OUTPUTS[f"inception_{size}_{width}"]) for width in (64, 2048)}
    assert torch.allclose(model(inputs), expected[2048], rtol=1e-4, atol=1e-5)
    assert torch.allclose(model.first_pool(inputs), expected[64], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (I3D, (1, 3, 16, 112, 112), "I3D takes clips"),
        (I3D, (1, 3, 9, 224, 224), "at least 10 frames, got 9"),
        (ResNet3D50, (1, 3, 16, 224, 224), "takes clips of shape"),
        (FIDInception, (1, 3, 224, 224), "takes images of shape"),
    ],
)
def test_other_shapes_are_refused(model: type[nn.Module], shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model()(torch.zeros(shape))


def test_pool_frames_is_1_or_2() -> None:
    with pytest.raises(ValueError, match="pool_frames"):
        I3D(pool_frames=3)  # type: ignore[arg-type]
