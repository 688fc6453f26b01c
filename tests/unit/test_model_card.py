"""The model card: what it takes from a run, and what it says without one."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ardiff.data.encode import contact_sheet
from ardiff.data.latents import LatentSet, LatentStatistics, write_description
from ardiff.errors import DataError
from ardiff.metrics.protocol import Protocol
from ardiff.metrics.scores import SetScore, write_scores
from ardiff.model_card import ModelCard
from ardiff.pipeline import ARDiffusionPipeline

PROTOCOL: dict[str, Any] = {
    "name": "styleganv",
    "metric": "fvd",
    "network": "i3d",
    "weights": "i3d-0123456789abcdef",
    "num_frames": 16,
    "stride": 1,
    "num_real": 256,
    "num_fake": 128,
    "ddof": 1,
    "real_split": "test",
    "real_data": "feed",
}
SCORE: dict[str, Any] = {
    "set": "ar-step-5",
    "metric": "fvd",
    "score": 123.4,
    "baseline": 20.5,
    "baseline_num": 128,
    "low": 110.25,
    "high": None,
    "infinity": None,
    "fake": "videos",
    "fake_data": "beef",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A training run with its latents, its samples and scores of its videos."""
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    for step, grey in ((100, 0), (200, 255)):
        sheet = contact_sheet(np.full((1, 2, 16, 16, 3), grey, np.uint8))
        (folder / "samples" / f"step-{step:06d}.png").write_bytes(sheet)
    latents = LatentSet(
        "lat-print", 8, 2, 4, [], ["a", "b"], [30, 12], LatentStatistics.neutral(2, 4), "vae", "", "cafe"
    )
    write_description(str(tmp_path / "latents"), latents)
    config = {"latents": str(tmp_path / "latents"), "train": {"num_steps": 200}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "versions.json").write_text(json.dumps({"torch": "2.13.0", "git": "1234abc"}))
    text = {f.name: "" for f in fields(Protocol) if f.type == "str" or f.type is str}
    protocol = Protocol(**{**text, **PROTOCOL})
    write_scores(str(tmp_path / "scores"), [SetScore(**{**SCORE, "high": 140.75}, protocol=protocol)], {})
    return folder


def test_a_card_holds_what_the_run_says(make_pipeline: Any, run: Path, tmp_path: Path) -> None:
    card = ModelCard(license="mit", data="Drawn shapes.", run=str(run), scores=(str(tmp_path / "scores"),))
    pipeline = make_pipeline()
    pipeline.save_pretrained(str(tmp_path / "model"), card, "lab/tiny")
    _, header, text = (tmp_path / "model" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header) == {
        "license": "mit",
        "library_name": "ardiff",
        "tags": ["video-generation", "ar-diffusion"],
    }
    assert text.startswith("\n# lab/tiny\n")
    assert "videos of 16 x 16 pixels of 3 classes (disc, ring, square), and was trained" in text
    assert "The weights: mit." in text
    assert "Drawn shapes." in text
    assert "clips `cafe`, latents `lat-print`, 42 clips" in text
    [row] = [line for line in text.splitlines() if line.startswith("| ar-step-5")]
    assert "| fvd | 123.40 | 110.25 to 140.75 | 20.50 | styleganv: i3d" in row
    assert "256 real (test) and 128 generated clips" in row
    assert "torch 2.13.0, git 1234abc" in text
    assert "num_steps: 200" in text
    sheet = (tmp_path / "model" / "sheet.png").read_bytes()
    assert sheet == (run / "samples" / "step-000200.png").read_bytes()
    assert "(sheet.png)" in text
    assert ARDiffusionPipeline.from_pretrained(str(tmp_path / "model")).info == pipeline.info


def test_a_card_without_a_run_hides_nothing(make_pipeline: Any, tmp_path: Path) -> None:
    make_pipeline(num_classes=0).save_pretrained(str(tmp_path / "model"), ModelCard())
    text = (tmp_path / "model" / "README.md").read_text()
    assert "license: other" in text
    for line in ("# model", "No license is granted.", "Not described.", "Fingerprint: unknown.", "Not scored."):
        assert line in text.splitlines()
    assert "sheet.png" not in text
    assert not (tmp_path / "model" / "sheet.png").exists()
    assert "beta_end: 0.02" in text


def test_missing_and_damaged_files_are_errors(make_pipeline: Any, run: Path, tmp_path: Path) -> None:
    def save(**values: Any) -> None:
        make_pipeline().save_pretrained(str(tmp_path / "model"), ModelCard(**values))

    with pytest.raises(DataError, match="There are no scores in"):
        save(scores=(str(tmp_path / "nothing"),))
    with pytest.raises(DataError, match=r"nothing\.png"):
        save(sheet=str(tmp_path / "nothing.png"))
    with pytest.raises(DataError, match=r"nothing/config\.yaml"):
        save(run=str(tmp_path / "nothing"))
    (run / "versions.json").write_text("{")
    with pytest.raises(DataError, match=r"versions\.json is not valid JSON"):
        save(run=str(run))
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(DataError, match=r"config\.yaml is not valid YAML"):
        save(run=str(run))


def test_a_card_names_the_width_first(make_pipeline: Any, make_vae: Any, tmp_path: Path) -> None:
    pipeline = make_pipeline()
    pipeline.vae = make_vae(resolution=[16, 40], buckets=[[40, 16]])
    pipeline.save_pretrained(str(tmp_path), ModelCard(), "lab/wide")
    assert "videos of 40 x 16 or 16 x 40 pixels" in (tmp_path / "README.md").read_text()
