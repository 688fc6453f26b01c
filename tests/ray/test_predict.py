"""``prepare --recipe moving-mnist``, ``predict`` and ``evaluate`` as a user runs them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import Result

from ardiff.data.clips import read_clip
from ardiff.data.manifest import read_manifest
from ardiff.metrics.predictors import last_frame
from ardiff.metrics.scores import read_scores
from ardiff.pipeline import ARDiffusionPipeline

pytestmark = pytest.mark.ray
Command = Callable[..., Result]
SIZES = {"num_train": 2, "num_test": 5, "num_frames": 8, "frame_side": 16, "digit_side": 6}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("digits") / "digits.npy"
    np.save(path, np.random.default_rng(0).integers(150, 256, (30, 6, 6), dtype=np.uint8))
    return str(path)


def test_predictions_are_scored_beside_baselines(
    cluster: None, digits: str, tmp_path: Path, ardiff: Command, make_pipeline: Callable[..., ARDiffusionPipeline]
) -> None:
    sizes = [f"moving_mnist.{name}={value}" for name, value in SIZES.items()]
    ardiff("prepare", "--recipe", "moving-mnist", "--digits", digits, "--output", tmp_path / "data", *sizes).expect(0)
    manifest = tmp_path / "data" / "manifest.parquet"
    records = [record for record in read_manifest(str(manifest)) if record.split == "test"]
    assert len(records) == 5

    pipeline = make_pipeline(num_classes=0)
    pipeline.save_pretrained(str(tmp_path / "pipeline"))
    output = tmp_path / "predictions"
    command = ["predict", tmp_path / "pipeline", output, "--manifest", manifest, "--num-videos", "5"]
    command += ["--batch-size", "3", "--num-given", "4", "--num-frames", "8", "--num-inference-steps", "3"]
    ardiff(*command).expect(0)

    folders = [folder for folder in output.iterdir() if folder.is_dir()]
    sets = {f.name: np.concatenate([np.load(file) for file in sorted(f.glob("*.npy"))]) for f in folders}
    assert sets.keys() == {"real", "model", "last-frame", "constant-velocity"}
    assert {videos.shape for videos in sets.values()} == {(5, 4, 16, 16, 3)}
    clips = np.stack([read_clip(record, 0, 8, 1, None) for record in records])
    assert np.array_equal(sets["real"], clips[:, 4:])
    assert np.array_equal(sets["last-frame"], np.stack([last_frame(clip[:4], 4) for clip in clips]))
    alone = pipeline(condition=torch.from_numpy(clips[4, :4].copy()), num_frames=8, num_inference_steps=3, seed=4)
    assert np.array_equal(alone.frames[0, 4:].numpy(), sets["model"][4])

    (output / "real" / "000003.npy").unlink()
    before = (output / "model" / "000000.npy").stat().st_mtime_ns
    ardiff(*command).expect(0)
    assert (output / "real" / "000003.npy").exists()
    assert (output / "model" / "000000.npy").stat().st_mtime_ns == before
    refusal = ardiff(*command, "seed=7")
    refusal.expect(2)
    assert "give another output" in refusal.complaint

    names = ["model", "last-frame", "constant-velocity"]
    fake = ",".join(str(output / name) for name in names)
    scoring = ["--metrics", "mse,ssim-grey", "--frames", "4", "--num-clips", "5", "--output", tmp_path / "scores"]
    ardiff("evaluate", "--real", output / "real", "--fake", fake, *scoring).expect(0)
    scores = {(score.set, score.metric): score.score for score in read_scores(str(tmp_path / "scores"))}
    for name in names:
        error = (sets[name].astype(float) - sets["real"]) ** 2
        assert scores[name, "mse"] == pytest.approx(error.sum(axis=(2, 3)).mean() / 255**2, rel=1e-5)
        assert scores[name, "ssim-grey"] <= 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (["num_given=1"], "num_given must be 2 or more and below num_frames"),
        (["num_given=8"], "num_given must be 2 or more and below num_frames"),
        (["num_given=4", "prompt=a"], "prompt cannot be set: the given frames are the condition"),
        (["num_given=4", "batch_size=0"], "batch_size, max_actors and cpu_threads must be at least 1"),
    ],
)
def test_settings_that_predict_nothing_are_errors(change: list[str], reason: str, ardiff: Command) -> None:
    refusal = ardiff("predict", "num_frames=8", *change)
    refusal.expect(2)
    assert reason in refusal.complaint


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--recipe", "moving-mnist"], "recipe=moving-mnist and digits go together"),
        (["--digits", "a.gz"], "recipe=moving-mnist and digits go together"),
        (["videos", "--recipe", "moving-mnist", "--digits", "a.gz"], "give source or digits, not both"),
        (["--recipe", "moving-mnist", "--digits", "nowhere.gz"], "There is no file of digits nowhere.gz"),
    ],
)
def test_a_recipe_without_its_digits_is_an_error(
    options: list[str], reason: str, cluster: None, tmp_path: Path, ardiff: Command
) -> None:
    assert reason in ardiff("prepare", *options, "--output", tmp_path / "data").complaint
