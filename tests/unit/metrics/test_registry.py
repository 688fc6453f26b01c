"""A metric or network is one file: once it registers itself, configurations, help and scores know it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import ardiff
from ardiff.cli import main
from ardiff.errors import ConfigError
from ardiff.metrics import registry
from ardiff.metrics.distances import Frechet
from ardiff.metrics.paired import PairMeasure
from ardiff.metrics.registry import PairedMetric, SetMetric
from ray_jobs.evaluation.config import EvaluateConfig

MODULE = '''
"""The mean absolute error of grey levels."""

import numpy as np

from ardiff.metrics.registry import PairedMetric, register_metric


def mean_absolute_error(original: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(original.astype(float) - other).mean())


register_metric(PairedMetric(name="mae", function=mean_absolute_error))
'''


@pytest.fixture
def mae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A metric in a module of its own."""
    registry.metrics()
    monkeypatch.setattr(registry, "_metrics", dict(registry._metrics))
    (tmp_path / "metric_mae.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    __import__("metric_mae")
    yield
    del sys.modules["metric_mae"]


def test_a_registered_metric_is_a_name_in_configurations_and_help(
    mae: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [metric.name for metric in EvaluateConfig(metrics=("fvd", "mae")).paired_metrics] == ["mae"]
    assert main(["evaluate", "--metrics", "mae", "--dry-run"]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert "kvd, lpips, lpips-vgg, mae, mse, psnr" in " ".join(capsys.readouterr().out.split())
    assert main(["evaluate", "--metrics", "maee", "--dry-run"]) == 2
    assert "there is no metric 'maee': did you mean 'mae'?" in capsys.readouterr().err


def test_a_registered_metric_is_measured(mae: None) -> None:
    pairs = np.zeros((2, 2, 3, 8, 8, 3), np.uint8)
    pairs[1, 1] = 10
    measure = PairMeasure(EvaluateConfig(metrics=("mae", "psnr")).paired_metrics, {}, torch.device("cpu"))
    assert measure(pairs)[:, 0, 0].tolist() == [0.0, 10.0]


def test_every_set_metric_has_a_spec_and_every_network_its_name() -> None:
    for name in registry.scored_metric_names():
        metric = registry.find_metric(name)
        assert isinstance(metric, PairedMetric) or registry.set_specs(metric)
        for spec in registry.set_specs(metric).values():
            assert registry.find_network(spec.network.name) is spec.network
    assert registry.find_spec("styleganv", "fvd").distance == Frechet(ddof=0)
    assert registry.find_spec("ardiff-release", "fvd").options == {"pool_frames": 1}


def test_unknown_and_repeated_names() -> None:
    with pytest.raises(ValueError, match="no network 'i2d': did you mean 'i3d'"):
        registry.find_network("i2d")
    with pytest.raises(ValueError, match="styleganv does not define fid-vid: use ardiff-release"):
        registry.find_spec("styleganv", "fid-vid")
    with pytest.raises(ValueError, match="does not define psnr"):
        registry.find_spec("styleganv", "psnr")
    with pytest.raises(ValueError, match="'fvd' is registered twice"):
        registry.register_metric(SetMetric(name="fvd"))
    with pytest.raises(ConfigError, match="at least 10 frames, got 9"):
        EvaluateConfig(num_frames=9)


PLUGIN = """
from ardiff.metrics.distances import Frechet
from ardiff.metrics.networks.random_frames import RandomFrameFeatures, RANDOM_FRAMES_EXTRACTOR
from ardiff.metrics.registry import Extractor, MetricSpec, SetMetric, register_metric, register_network

NETWORK = Extractor(
    name="mine", build=RandomFrameFeatures, untrained=True, size=64, value_range="[-1, 1]",
    features=RANDOM_FRAMES_EXTRACTOR.features,
)
register_network(NETWORK)
SPEC = MetricSpec(network=NETWORK, feature="32", resize="bilinear", distance=Frechet())
register_metric(SetMetric(name="fd-mine", specs={"styleganv": SPEC}))
"""


@pytest.mark.parametrize("works", [True, False])
def test_other_packages_register_extractors_by_an_entry_point(tmp_path: Path, works: bool) -> None:
    (tmp_path / "my_extractor.py").write_text(PLUGIN if works else "raise RuntimeError('no weights')")
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ardiff.extractors]\nmine = my_extractor\n")
    path = os.pathsep.join([str(tmp_path), str(Path(ardiff.__file__).parents[1])])
    code = "from ardiff.metrics.registry import *; print(scored_metric_names(), networks()['mine'].size)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if works:
        assert "'fd-mine'" in done.stdout
        assert done.stdout.endswith(" 64\n")
    else:
        assert "my-package registers 'my_extractor' in ardiff.extractors, which fails (no weights)" in done.stderr
