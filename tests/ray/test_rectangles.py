"""Videos of 16:9 through all jobs: drawn, trained on, encoded, generated, scored, swept and fine-tuned from."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from jobs import Result, section
from PIL import Image

from ardiff.cli import main
from ardiff.data.decode import decode_clip
from ardiff.data.encode import encode_video
from ardiff.data.manifest import read_manifest
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.pretrained import load_autoencoder

pytestmark = pytest.mark.ray

Command = Callable[..., Result]
SYNTHETIC = {"num_train": 12, "num_test": 4, "num_frames": 8, "num_long": 0, "resolution": "36,64", "radius": 7}
VAE = {"patch_size": 4, "num_tokens": 2, "token_dim": 4, "width": 16, "depth": 1, "num_heads": 2, "temporal_window": 4}
DIT = {"num_frames": 8, "num_tokens": 2, "token_dim": 4, "width": 16, "depth": 1, "num_heads": 2, "num_classes": 4}
TRAIN = ["train.num_steps=3", "train.batch_size=4", "train.sample_every=3", "train.cpu_threads=1"]
SAMPLING = ["num_frames=8", "num_inference_steps=4"]


def vae_settings(folder: Path) -> list[str]:
    return [f"clips.manifest={folder}/data/manifest.parquet", "clips.num_frames=4", *TRAIN, *section("vae", VAE)]


@pytest.fixture(scope="module")
def trained(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, AR-VAE, latents and pipeline."""
    folder = tmp_path_factory.mktemp("wide")
    assert main(["prepare", f"output={folder}/data", *section("synthetic", SYNTHETIC)]) == 0
    assert main(["train-vae", f"output={folder}/vae", *vae_settings(folder), "vae.resolution=36,64"]) == 0
    latents = [f"manifest={folder}/data/manifest.parquet", f"vae={folder}/vae/model", f"output={folder}/latents"]
    assert main(["encode", *latents, "num_frames=8", "max_actors=1", "batch_size=4"]) == 0
    [description] = (folder / "latents").rglob("latents.json")
    dit = [f"latents={description.parent}", f"output={folder}/dit", *TRAIN, *section("dit", DIT)]
    assert main(["train-dit", *dit]) == 0
    return folder


def test_from_videos_to_scores(ardiff: Command, trained: Path, tmp_path: Path) -> None:
    manifest = trained / "data" / "manifest.parquet"
    assert {(r.width, r.height) for r in read_manifest(str(manifest))} == {(64, 36)}
    assert load_autoencoder(f"{trained}/vae/model").config.resolution == (36, 64)
    [sheet] = (trained / "vae" / "samples").glob("*.png")
    with Image.open(sheet) as picture:
        assert picture.width > 4 * 2 * 64  # four frames, enlarged

    generated = [f"pipeline={trained}/dit/pipeline", f"output={tmp_path}/videos", "num_videos=4", "ar_step=2"]
    ardiff("generate", *generated, *SAMPLING, "batch_size=2", "max_actors=1").expect(0)
    records = read_manifest(f"{tmp_path}/videos/manifest.parquet")
    assert [(r.width, r.height, r.num_frames) for r in records] == [(64, 36, 8)] * 4
    pipeline = ARDiffusionPipeline.from_pretrained(f"{trained}/dit/pipeline")
    settings = {"num_frames": 8, "num_inference_steps": 4, "ar_step": 2, "seed": 0, "class_label": records[0].label}
    expected = decode_clip(encode_video(pipeline(**settings).frames[0].numpy(), 8.0, crf=8), 0, 8)
    assert expected.shape == (8, 36, 64, 3)
    assert np.abs(decode_clip(Path(records[0].uri).read_bytes(), 0, 8).astype(int) - expected).mean() < 1

    quick = [f"real={manifest}", f"fake=[{tmp_path}/videos/manifest.parquet]", f"vae={trained}/vae/model"]
    quick += [f"output={tmp_path}/scores", "num_clips=4", "num_frames=8", "batch_size=4", "resolution=36,64"]
    ardiff("evaluate-quick", *quick).expect(0)
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())["scores"]
    assert {score["protocol"]["resolution"] for score in scores} == {"36x64"}


@pytest.mark.slow
def test_a_sweep_and_a_model_of_another_shape(ardiff: Command, trained: Path, tmp_path: Path) -> None:
    grid = [f"grid.checkpoints=[{trained}/dit/pipeline]", "grid.axes.ar_step=[2,4]", "grid.classes=[0,1]"]
    grid += ["grid.seeds=1", *(f"grid.sampling.{value}" for value in SAMPLING)]
    ardiff("sweep", f"output={tmp_path}/sweep", *grid, "batch_size=4", "max_actors=1").expect(0)
    assert len(list((tmp_path / "sweep").rglob("*.mp4"))) == 4

    tall = ["train-vae", "--output", tmp_path / "tall", *vae_settings(trained), f"init_from={trained}/vae/model"]
    ardiff(*tall, "vae.resolution=64,36").expect(0)
    assert load_autoencoder(f"{tmp_path}/tall/model").config.resolution == (64, 36)
    refused = ardiff(*tall, "vae.resolution=64,40")
    assert (refused.code, "another configuration" in refused.complaint) == (1, True)


def test_a_shape_that_the_patches_do_not_fill(ardiff: Command) -> None:
    refused = ardiff("train-vae", "vae.resolution=36,64", "vae.patch_size=8").expect(2)
    assert "vae: resolution [36, 64] must be a multiple of patch_size 8" in refused
