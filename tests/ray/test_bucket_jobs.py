"""Videos of several shapes and lengths: the same batches for all workers, and one model from training to sampling."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from jobs import Result, section

from ardiff import distributed
from ardiff.cli import main
from ardiff.data.bucket_stream import clip_stream
from ardiff.data.config import ClipConfig, SyntheticConfig
from ardiff.data.decode import decode_clip
from ardiff.data.encode import encode_video
from ardiff.data.latents import read_description
from ardiff.data.manifest import VideoRecord, manifest_table, read_manifest, write_manifest
from ardiff.data.synthetic_set import write_video
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.pretrained import load_autoencoder
from ardiff.resolution import Resolution
from ardiff.train.config import TrainConfig
from ray_jobs.training.batches import ray_batches

pytestmark = pytest.mark.ray

Command = Callable[..., Result]
SHAPES = (Resolution(24, 24), Resolution(16, 32), Resolution(32, 16))
STEPS, BATCH, RESTART = 8, 6, 3
VAE = {"patch_size": 8, "num_tokens": 2, "token_dim": 4, "width": 16, "depth": 1, "num_heads": 2, "temporal_window": 4}
DIT = {"num_frames": 8, "num_tokens": 2, "token_dim": 4, "width": 16, "depth": 1, "num_heads": 2, "num_classes": 4}
TRAIN = ["train.batch_size=4", "train.cpu_threads=1", "train.log_every=1"]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[VideoRecord]:
    """Four videos of 48 x 48, eight of 32 x 64 and four of 64 x 32 pixels, height first, and their manifest. Half of
    them have 10 frames, the others 14."""
    folder = tmp_path_factory.mktemp("shapes")
    records = []
    for shape, count in ((SHAPES[0], 4), (SHAPES[1], 8), (SHAPES[2], 4)):
        resolution = Resolution(2 * shape.height, 2 * shape.width)
        drawn = SyntheticConfig(resolution=resolution, num_frames=10, num_long=count // 2, long_frames=14)
        records += [write_video(drawn, f"{folder}/{shape}", index, "train") for index in range(count)]
    write_manifest(f"{folder}/manifest.parquet", records)
    return records


def manifest_of(records: list[VideoRecord]) -> str:
    return records[0].uri.partition("/24x24/")[0] + "/manifest.parquet"


@pytest.mark.parametrize(
    ("num_workers", "first_step"),
    [(3, 0), (1, RESTART), *(pytest.param(n, 0, marks=pytest.mark.slow) for n in (1, 2))],
)
def test_batches_are_those_of_the_stream(
    records: list[VideoRecord], cluster: None, monkeypatch: pytest.MonkeyPatch, num_workers: int, first_step: int
) -> None:
    monkeypatch.setattr(distributed, "size", lambda: num_workers)
    clips = ClipConfig(num_frames=12, lengths=(3,), crop="random", horizontal_flip=True)
    stream = clip_stream(manifest_table(records), clips, SHAPES, 5, BATCH)
    config = TrainConfig(num_steps=STEPS, batch_size=BATCH, num_workers=num_workers, loading_tasks=1)
    shares = [list(ray_batches(stream, first_step * BATCH, config, rank, None)) for rank in range(num_workers)]
    seen = set()
    for step, parts in enumerate(zip(*shares, strict=True), start=first_step):
        chunks = range(stream.locate(step * BATCH)[0], stream.locate((step + 1) * BATCH - 1)[0] + 1)
        expected = [stream.load(chunk) for chunk in chunks]
        for name in ("video", "label", "shape"):
            batch = torch.cat([part[name] for part in parts]).numpy()
            assert np.array_equal(batch, np.concatenate([chunk[name] for chunk in expected])), (step, name)
        seen |= {(shape, expected[0]["video"].shape[1]) for shape in expected[0]["shape"].tolist()}
    assert {shape for shape, _ in seen} == {0, 1, 2}
    assert {frames for _, frames in seen} == {3, 12}


@pytest.fixture(scope="module")
def trained(records: list[VideoRecord], cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with AR-VAE, latents and pipeline."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(["train-vae", f"output={folder}/vae", *vae_settings(records), "train.num_steps=6"]) == 0
    latents = [f"manifest={manifest_of(records)}", f"vae={folder}/vae/model", f"output={folder}/latents"]
    assert main(["encode", *latents, "num_frames=8", "max_actors=1", "batch_size=4"]) == 0
    [description] = (folder / "latents").rglob("latents.json")
    dit = [f"latents={description.parent}", f"output={folder}/dit", *TRAIN, *section("dit", DIT)]
    assert main(["train-dit", *dit, "train.num_steps=3"]) == 0
    return folder


def vae_settings(records: list[VideoRecord]) -> list[str]:
    settings = [f"clips.manifest={manifest_of(records)}", "clips.num_frames=12", "clips.lengths=[3]"]
    settings += ["clips.buckets=[[16,32],[32,16]]"]
    return [*settings, "vae.resolution=24", *section("vae", VAE), *TRAIN, "train.checkpoint_every=3"]


def test_from_videos_of_three_shapes_to_videos_of_three_sizes(
    ardiff: Command, records: list[VideoRecord], trained: Path, tmp_path: Path
) -> None:
    assert load_autoencoder(f"{trained}/vae/model").config.shapes == SHAPES
    history = json.loads((trained / "vae" / "history.json").read_text())
    shares = [dict(history[f"share_{shape}"]) for shape in SHAPES]
    assert [sum(share[step] for share in shares) for step in range(1, 7)] == [1] * 6
    assert all(set(share.values()) == {0.0, 1.0} for share in shares)
    of_lengths = [dict(history[f"share_{frames}_frames"]) for frames in (12, 3)]
    assert all(set(share.values()) == {0.0, 1.0} for share in of_lengths)
    assert [sum(share[step] for share in of_lengths) for step in range(1, 7)] == [1] * 6

    [file] = (trained / "latents").rglob("latents.json")
    description = read_description(str(file.parent))
    assert description.shapes == [[24, 24], [16, 32], [32, 16]]
    shape_of = {r.uri: SHAPES.index(Resolution(r.height // 2, r.width // 2)) for r in records}
    stored = [row for f in description.files for row in pq.read_table(file.parent / f).to_pylist()]
    assert {row["uri"]: row["shape"] for row in stored} == shape_of

    generated = [f"pipeline={trained}/dit/pipeline", "num_videos=2", "ar_step=2", "num_frames=8", "batch_size=2"]
    generated += ["num_inference_steps=4", "max_actors=1"]
    ardiff("generate", *generated, f"output={tmp_path}/wide", "--size", "32x16").expect(0)
    videos = read_manifest(f"{tmp_path}/wide/manifest.parquet")
    assert [(v.width, v.height) for v in videos] == [(32, 16)] * 2
    assert decode_clip(Path(videos[0].uri).read_bytes(), 0, 8).shape == (8, 16, 32, 3)
    refused = ardiff("generate", *generated, f"output={tmp_path}/other", "--size", "32x32")
    assert (refused.code, "the model makes 24x24, 32x16 or 16x32 only" in refused.complaint) == (2, True)


@pytest.mark.slow
def test_a_sweep_over_sizes(ardiff: Command, trained: Path, tmp_path: Path) -> None:
    grid = [f"grid.checkpoints=[{trained}/dit/pipeline]", "grid.axes.size=[24x24,32x16,16x32]", "grid.classes=[0]"]
    grid += ["grid.seeds=2", "grid.sampling.num_frames=8", "grid.sampling.num_inference_steps=4"]
    ardiff("sweep", f"output={tmp_path}", *grid, "batch_size=4", "max_actors=1").expect(0)
    rows = pq.read_table(tmp_path / "manifest.parquet").to_pylist()
    assert len(rows) == 6
    pipeline = ARDiffusionPipeline.from_pretrained(f"{trained}/dit/pipeline")
    for row in rows:
        width, height = map(int, row["size"].split("x"))
        settings = {name: row[name] for name in ("size", "seed", "class_label", "num_inference_steps", "ar_step")}
        frames = pipeline(num_frames=8, **settings).frames[0].numpy()
        assert frames.shape == (8, height, width, 3)
        expected = decode_clip(encode_video(frames, 8.0, crf=8), 0, 8).astype(int)
        assert np.abs(decode_clip(Path(row["uri"]).read_bytes(), 0, 8) - expected).mean() < 1


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(
    ardiff: Command, records: list[VideoRecord], trained: Path, tmp_path: Path
) -> None:
    for steps in (3, 6):
        err = ardiff("train-vae", "--output", tmp_path, *vae_settings(records), f"train.num_steps={steps}").expect(0)
    assert "resuming from the checkpoint of step 3" in err
    files = [folder / "model" / "vae.safetensors" for folder in (tmp_path, trained / "vae")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_shapes_that_are_chosen_and_clips_that_are_encoded_in_training(
    ardiff: Command, records: list[VideoRecord], trained: Path, tmp_path: Path
) -> None:
    auto = [value for value in vae_settings(records) if not value.startswith("clips.buckets")]
    err = ardiff("train-vae", "--output", tmp_path / "vae", *auto, "clips.auto_buckets=2", "train.num_steps=2").expect(
        0
    )
    assert "Shapes: 24x24, 16x32, 32x16 (height x width)" in err
    clips = [f"data.vae={trained}/vae/model", f"data.clips.manifest={manifest_of(records)}", "data.clips.num_frames=6"]
    clips += ["data.clips.fps=4", "data.clips.lengths=[5]"]  # the videos have 5 or 7 frames at 4 frames/s
    dit = ["train-dit", "--output", tmp_path / "dit", "data.source=clips", *clips, "data.statistics_clips=8"]
    dit += [*TRAIN, *section("dit", DIT), "train.num_steps=4"]
    ardiff(*dit).expect(0)
    shares = json.loads((tmp_path / "dit" / "history.json").read_text())
    assert {value for i in range(3) for _, value in shares[f"share_shape_{i}"]} == {0.0, 1.0}
    assert {value for frames in (5, 6) for _, value in shares[f"share_{frames}_frames"]} == {0.0, 1.0}
    assert ARDiffusionPipeline.from_pretrained(f"{tmp_path}/dit/pipeline").info.shapes == SHAPES
    refused = ardiff(*dit, "data.clips.buckets=[[16,32]]").complaint
    assert "data.clips.buckets follows from the AR-VAE" in refused
