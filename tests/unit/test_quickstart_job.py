"""Which stages of the quickstart are run again, and what its report shows. No Ray is started."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ardiff.data.manifest import VideoRecord, write_manifest
from ardiff.metrics.networks.random3d import RandomVideoFeatures
from ardiff.metrics.shapes import SHAPE_MEASURES
from ardiff.metrics.weights import cached
from ardiff.resolution import Resolution
from ray_jobs.encode import EncodeConfig
from ray_jobs.evaluation.config import QuickConfig
from ray_jobs.evaluation.quick import BY_CONDITION, is_outdated
from ray_jobs.quickstart import Inputs, QuickstartConfig, evaluation_stage
from ray_jobs.reports.quickstart import _real_clips
from ray_jobs.runtime.stages import StageRunner, stage


@dataclass(frozen=True)
class Config:
    output: str


def test_a_complete_stage_is_run_again_only_if_it_lacks_something(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: list[str] = []

    def job(config: Config, key: str) -> None:
        with stage("evaluate", config.output, key) as run:
            runs.append(key)
            run.results = {"number": len(runs)}

    def do(again: bool) -> int:
        number: int = StageRunner(lambda: None).run(job, Config(str(tmp_path)), lambda record: again).results["number"]
        return number

    assert [do(False), do(False)] == [1, 1]
    assert "done before" in capsys.readouterr().err
    assert [do(True), do(False)] == [2, 2]
    assert len(set(runs)) == 1


def test_scores_are_outdated_once_they_lack_fvd_or_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARDIFF_CACHE", str(tmp_path))
    config, network = QuickConfig(output=str(tmp_path)), RandomVideoFeatures(0).name
    without: dict[str, Any] = {"extractors": {"distance": network}, "sets": {"real": {"distance": 1.0}}}
    with_fvd = without | {"extractors": {"distance": network, "fvd": "i3d"}}
    assert is_outdated(config, without), "there are no means by prompt or class"
    (tmp_path / BY_CONDITION).touch()
    assert not is_outdated(config, without)
    assert is_outdated(replace(config, extractor_seed=1), without)
    shapes = replace(config, shapes=True)
    assert is_outdated(shapes, without)
    assert not is_outdated(shapes, without | {"sets": {"real": dict.fromkeys(SHAPE_MEASURES, 1.0)}})
    cached("i3d").parent.mkdir(parents=True)
    cached("i3d").touch()
    assert is_outdated(config, without)
    assert not is_outdated(config, with_fvd)
    assert not is_outdated(replace(config, i3d_clips=0), without)


def test_real_clips_are_scored_at_the_rate_that_was_trained_on() -> None:
    scores = QuickConfig(num_clips=2)
    config = QuickstartConfig(encode=EncodeConfig(fps=8.0), evaluate=scores)
    inputs = Inputs("manifest.parquet", "vae", "latents", synthetic=False)
    assert evaluation_stage(config, "runs", inputs, []).fps == 8.0
    other = replace(config, evaluate=replace(scores, fps=4.0))
    assert evaluation_stage(other, "runs", inputs, []).fps == 4.0


def test_clips_are_scored_in_the_shape_of_the_autoencoder() -> None:
    shape = Resolution(48, 64)
    config = QuickstartConfig(evaluate=QuickConfig(num_clips=2))
    training = replace(config.train_vae, vae=replace(config.train_vae.vae, resolution=shape))
    inputs = Inputs("manifest.parquet", "vae", "latents", synthetic=False)
    assert evaluation_stage(replace(config, train_vae=training), "runs", inputs, []).resolution == shape


def test_the_report_shows_folders_of_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "clouds"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (24, 16), (60 * number, 0, 0)).save(folder / f"{number}.png")
    record = VideoRecord(f"{folder}/", 1, "png", 24, 16, 25.0, 4, 0, "sky", "test", "ok", "")
    write_manifest(str(tmp_path / "manifest.parquet"), [record])
    config = QuickConfig(real=str(tmp_path / "manifest.parquet"), num_frames=4, resolution=Resolution.square(16))
    clips, names = _real_clips(config, 8)
    assert names == ["sky"]
    assert clips[0, :, 0, 0, 0].tolist() == [0, 60, 120, 180]
    assert clips.shape == (1, 4, 16, 16, 3)
