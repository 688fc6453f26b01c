"""The examples that run jobs: training on a folder, fine-tuning the result, and a score."""

import re
from pathlib import Path

import numpy as np
import pytest
from example_files import example

from ardiff.data.encode import encode_video
from ardiff.pipeline import ARDiffusionPipeline

pytestmark = [pytest.mark.ray, pytest.mark.slow]  # eight jobs


def put_videos(folder: Path, seed: int) -> str:
    generator = np.random.default_rng(seed)
    for name in ("bright", "dark"):
        (folder / name).mkdir(parents=True)
        for number in range(6):
            frames = generator.integers(0, 128, (20, 16, 16, 3), dtype=np.uint8) + (128 if name == "bright" else 0)
            (folder / name / f"{number}.mp4").write_bytes(encode_video(frames, 8))
    return str(folder)


def test_train_fine_tune_and_score(cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, other = put_videos(tmp_path / "own", 0), put_videos(tmp_path / "other", 1)
    sizes = ["--size", "16", "--width", "16", "--vae-steps", "4", "--dit-steps", "4"]
    example("train_on_a_folder").main([own, str(tmp_path / "run"), *sizes])
    trained = f"{tmp_path}/run/dit/pipeline"
    example("fine_tune").main([trained, other, str(tmp_path / "tuned"), "--steps", "2"])
    pipelines = [ARDiffusionPipeline.from_pretrained(uri) for uri in (trained, f"{tmp_path}/tuned/dit/pipeline")]
    assert [p.class_names for p in pipelines] == [["bright", "dark"]] * 2
    weights = [next(p.dit.parameters()) for p in pipelines]
    assert 0 < (weights[0] - weights[1]).abs().max() < 0.01  # fine-tuning starts from the trained weights
    assert all(bool((a == b).all()) for a, b in zip(*(p.vae.parameters() for p in pipelines), strict=True))

    capsys.readouterr()
    example("score_other_videos").main([own, other, str(tmp_path / "scores"), "--num-clips", "4"])
    shown = capsys.readouterr().out
    assert re.search(r"frame-difference \d\.\d+, 95 % interval", shown)
    assert "styleganv: random-frames" in shown
