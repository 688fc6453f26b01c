"""The feature networks with rule-filled weights against the outputs of the public implementations."""

import copy
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

from ardiff.errors import ConfigError
from ardiff.metrics.extractors import FeatureExtractor
from ardiff.metrics.networks.i3d import I3D, I3D_EXTRACTOR, _MaxPool, _same
from ardiff.metrics.networks.inception import FIDInception
from ardiff.metrics.networks.resnet3d import ResNet3D50
from ardiff.metrics.preprocess import resize_frames, scale_range
from ardiff.metrics.registry import find_spec
from ardiff.resolution import Resolution

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
    assert len(model.state_dict()) == expected["n_keys"]
    if "n_params" in expected:
        assert sum(parameter.numel() for parameter in model.parameters()) == expected["n_params"]
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


@torch.no_grad()
def test_openvino_computes_the_same_i3d(i3d: I3D) -> None:
    spec, clips = find_spec("styleganv", "fvd"), np.random.default_rng(0).integers(0, 256, (1, 16, 64, 64, 3), np.uint8)
    plain, compiled = (FeatureExtractor(spec, i3d.state_dict(), torch.device("cpu"), b) for b in ("torch", "openvino"))
    expected, features = plain(clips), compiled(clips)
    assert features.dtype == np.float32
    assert np.abs(features - expected).max() <= 1e-4 * np.abs(expected).max()
    assert (features != expected).any(), "OpenVINO did not compute it"
    with pytest.raises(ConfigError, match="OpenVINO does not compute the network 'inception': use backend=torch"):
        FeatureExtractor(
            find_spec("styleganv", "fid-img"), FIDInception().state_dict(), torch.device("cpu"), "openvino"
        )


LENGTHS = ["T10", "T16", "T17", slow("T32"), slow("T64")]


def stored(name: str) -> Tensor:
    return torch.from_numpy(OUTPUTS[name])


@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_i3d_is_that_of_the_public_port(i3d: I3D, length: str) -> None:
    run = EXPECTED["i3d"]["runs"][length]
    pooled = i3d._pooled(clip(run))
    logits = i3d.logits(pooled)[0, :, :, 0, 0]
    assert logits.shape[1] == run["logits_time_steps"]
    assert torch.allclose(logits, stored(f"i3d_{length}_piergiaj_logits_time"), rtol=0, atol=1e-4)
    assert torch.allclose(pooled[0, :, :, 0, 0], stored(f"i3d_{length}_piergiaj_pool1024_time"), rtol=0, atol=1e-4)
    # The mean over time is what forward gives, and the original graph.
    mean = logits.mean(dim=1)
    assert torch.allclose(mean, stored(f"i3d_{length}_tfhub_style_logits400"), rtol=0, atol=1e-4)
    assert float(mean.square().mean().sqrt()) == pytest.approx(run["rms_logit"], abs=1e-5)


@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_i3d_of_the_authors_pools_each_time_step(i3d: I3D, length: str) -> None:
    model = I3D(pool_frames=1).eval()
    model.load_state_dict(i3d.state_dict())
    run = EXPECTED["i3d"]["runs"][length]
    expected, original = stored(f"i3d_{length}_authors_logits400"), stored(f"i3d_{length}_tfhub_style_logits400")
    logits = model(clip(run))[0]
    assert torch.allclose(logits, expected, rtol=0, atol=1e-4)
    assert float((logits - original).abs().max()) == pytest.approx(
        run["max_abs_authors_minus_tfhub_style"], rel=1e-3, abs=1e-4
    )
    assert torch.allclose(expected, original, atol=1e-4) == (length in ("T10", "T16"))


@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_another_epsilon_is_what_sets_cdfvd_apart(i3d: I3D, length: str) -> None:
    model = I3D().eval()
    model.load_state_dict(i3d.state_dict())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.eps = 1e-5
    run = EXPECTED["i3d"]["runs"][length]
    logits, original = model(clip(run))[0], stored(f"i3d_{length}_tfhub_style_logits400")
    assert torch.allclose(logits, stored(f"i3d_{length}_cdfvd_logits400"), rtol=0, atol=1e-4)
    assert float((logits - original).abs().max()) == pytest.approx(run["max_abs_cdfvd_minus_tfhub_style"], abs=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_rounding_is_that_of_float32(i3d: I3D) -> None:
    run = EXPECTED["i3d"]["runs"]["T16"]
    exact = copy.deepcopy(i3d).double()(clip(run).double())
    assert float((i3d(clip(run)) - exact).abs().max()) < 3 * run["max_abs_f32_minus_f64"]


@torch.no_grad()
def test_every_layer_of_i3d_is_that_of_the_public_port(i3d: I3D) -> None:
    run = EXPECTED["i3d"]["runs"]["T16"]
    seen: dict[str, Tensor] = {}
    names = {module: name for name, module in i3d.named_children()}
    hooks = [m.register_forward_hook(lambda module, _, out: seen.update({names[module]: out})) for m in names]
    video = clip(run)
    pooled = i3d.pooled_in_time(video)[0]
    for hook in hooks:
        hook.remove()
    assert torch.allclose(pooled, stored("i3d_T16_piergiaj_pool1024_time"), rtol=0, atol=1e-4)
    assert set(run["endpoints"]) == set(seen)
    for name, layer in run["endpoints"].items():
        check_summary(seen[name], layer, 1e-4)


def check_summary(output: Tensor, expected: dict[str, Any], tolerance: float) -> None:
    """A tensor by its shape, mean, deviation, first eight and last four values."""
    assert list(output.shape) == expected["shape"]
    values = output.double().flatten()
    for found, wanted in (
        (values.mean(), expected["mean"]),
        (values.std(), expected["std"]),
        (values[:8], expected["first8"]),
        (values[-4:], expected["last4"]),
    ):
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("length", ["T16", "T32"])
@torch.no_grad()
def test_resnet3d(length: str) -> None:
    run = EXPECTED["resnet3d50"]["runs"][length]
    features = filled(ResNet3D50(), "resnet3d50")(clip(run) * run["clip_scale"])
    expected = torch.from_numpy(OUTPUTS[f"resnet3d50_{length}_pool2048"])  # of mean 14691 and 32571, some are 0
    assert torch.allclose(features[0], expected, rtol=1e-4, atol=0.1)
    check_summary(features, run["out"], 1e-4)


@pytest.mark.parametrize(("size", "seed"), [(64, 31), (256, 32), (299, 33)])
@torch.no_grad()
def test_inception(size: int, seed: int) -> None:
    model = filled(FIDInception(), "inception_v3_fid")
    assert isinstance(model, FIDInception)
    assert f"RandomState({seed})" in EXPECTED["inception_v3_fid"]["runs"][str(size)]["image_rule"]
    images = np.random.RandomState(seed).randint(0, 256, size=(2, 3, size, size)).astype(np.uint8)
    pixels = resize_frames(torch.from_numpy(images.transpose(0, 2, 3, 1).copy()), Resolution.square(299), "tf-bilinear")
    inputs = scale_range(pixels, "(x - 128) / 128")
    expected = {width: torch.from_numpy(OUTPUTS[f"inception_{size}_{width}"]) for width in (64, 2048)}
    for width, features in ((2048, model(inputs)), (64, model.first_pool(inputs))):
        assert torch.allclose(features, expected[width], rtol=1e-4, atol=1e-5)
        check_summary(features, EXPECTED["inception_v3_fid"]["runs"][str(size)][f"out{width}"], 1e-4)


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


@pytest.mark.parametrize(("kernel", "stride"), [((1, 3, 3), (1, 2, 2)), ((3, 3, 3), (2, 2, 2)), ((3, 3, 3), (1, 1, 1))])
@pytest.mark.parametrize("size", [(5, 7, 8), (4, 6, 6)])
def test_maxima_axis_by_axis_are_those_of_boxes(
    kernel: tuple[int, int, int], stride: tuple[int, int, int], size: tuple[int, int, int]
) -> None:
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    boxes = nn.functional.max_pool3d(_same(x, kernel, stride), kernel, stride)
    assert torch.equal(_MaxPool(kernel, stride)(x), boxes)


def test_folded_normalisation_changes_rounding_only(i3d: I3D) -> None:
    x = torch.rand(1, 3, 10, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain = i3d(x)
    folded = I3D_EXTRACTOR.prepare(copy.deepcopy(i3d))
    assert not any(isinstance(module, nn.BatchNorm3d) for module in folded.modules())
    torch.testing.assert_close(folded(x), plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))
