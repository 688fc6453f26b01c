"""Jobs on videos in tars, on disk and on a real S3 server: the same numbers as from plain files."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from broken_videos import encode
from jobs import Result, section
from s3_server import S3Server, environment
from tar_files import tar_of

from ardiff.data import storage
from ardiff.data.error_log import read_errors
from ardiff.data.latents import read_description, read_keys, read_latents
from ardiff.data.manifest import read_manifest
from ardiff.data.members import unpacked
from ardiff.metrics.scores import read_scores
from ardiff.pretrained import save_autoencoder

pytestmark = pytest.mark.ray

Command = Callable[..., Result]
CLASSES = ("cats", "dogs")
VAE = {"resolution": 16, "patch_size": 8, "num_tokens": 2, "token_dim": 4, "width": 16, "depth": 1, "num_heads": 2}


@pytest.fixture(params=["disk", "s3"])
def root(request: pytest.FixtureRequest, cluster: None, s3_server: S3Server, tmp_path: Path) -> Iterator[str]:
    """A folder with the same videos as files and in tars, one of which is cut off."""
    with environment(s3_server.environment()):
        yield _write_videos(request, s3_server, tmp_path)


def _write_videos(request: pytest.FixtureRequest, s3_server: S3Server, tmp_path: Path) -> str:
    folder = str(tmp_path) if request.param == "disk" else f"s3://{s3_server.make_bucket()}"
    for split, count in (("train", 3), ("test", 1)):
        content: dict[str, bytes] = {}
        for index in range(count):
            for name in CLASSES:
                key = f"{name}/{split}-{index}"
                content |= {f"{key}.mp4": encode(crf=15 + len(content)), f"{key}.txt": f"{name} {index}".encode()}
        for key, data in content.items():
            storage.write_bytes(f"{folder}/plain/{split}/{key}", data)
        storage.write_bytes(f"{folder}/tars/{split}-0.tar", tar_of(content))
    storage.write_bytes(f"{folder}/tars/train-1.tar", tar_of({"cats/x.mp4": encode()})[:3000])
    return folder


def name_of(uri: str) -> str:
    """Such as ``cats/train-0.mp4``."""
    return "/".join(unpacked(uri).split("/")[-2:])


def latents_below(folder: str) -> dict[tuple[str, int], np.ndarray]:
    [description_uri] = [uri for uri in storage.list_files(folder) if uri.endswith("/latents.json")]
    inner = description_uri.removesuffix("/latents.json")
    description, found = read_description(inner), {}
    for file in description.files:
        shape = (description.num_frames, description.num_tokens, description.token_dim)
        latents, _ = read_latents(f"{inner}/{file}", shape)
        found |= {
            (name_of(key.uri), key.start): z for key, z in zip(read_keys(f"{inner}/{file}"), latents, strict=True)
        }
    return found


def test_tars_are_read_like_files(ardiff: Command, root: str, make_vae: Callable) -> None:
    said = ardiff("prepare", f"{root}/tars", f"{root}/data").expect(0)
    assert "error: 1 truncated" in said
    [bad] = read_errors(f"{root}/data/errors.parquet")
    assert (bad.uri, bad.error, bad.message) == (
        f"{root}/tars/train-1.tar",
        "truncated",
        "it is cut off in the member cats/x.mp4",
    )
    ardiff("prepare", f"{root}/plain", f"{root}/plain-data").expect(0)
    manifests = [read_manifest(f"{root}/{name}/manifest.parquet") for name in ("data", "plain-data")]
    videos, expected_videos = (
        {name_of(r.uri): (r.class_name, r.label, r.split, r.num_frames, r.captions) for r in records}
        for records in manifests
    )
    del videos["tars/train-1.tar"]
    assert videos == expected_videos
    assert len(videos) == 8

    said = ardiff("prepare", f"{root}/tars", f"{root}/data").expect(0)
    assert "0 videos are new or changed, 8 are known" in said
    assert read_manifest(f"{root}/data/manifest.parquet") == manifests[0]

    save_autoencoder(f"{root}/vae", make_vae())
    clips = ["num_frames=4", "clip_step=8", "batch_size=4", f"vae={root}/vae"]
    ardiff("encode", f"manifest={root}/data/manifest.parquet", f"output={root}/latents", *clips).expect(0)
    ardiff("encode", f"manifest={root}/plain-data/manifest.parquet", f"output={root}/plain-latents", *clips).expect(0)
    latents, expected = latents_below(f"{root}/latents"), latents_below(f"{root}/plain-latents")
    assert latents.keys() == expected.keys()
    assert len(latents) == 18
    for key, z in expected.items():
        np.testing.assert_array_equal(latents[key], z)

    said = ardiff("prepare", f"{root}/data/manifest.parquet", f"{root}/again").expect(0)
    assert len(read_manifest(f"{root}/again/manifest.parquet")) == 9


@pytest.mark.slow
def test_tars_are_trained_on_and_scored(ardiff: Command, root: str, tmp_path: Path) -> None:
    ardiff("prepare", f"{root}/tars", f"{root}/data").expect(0)
    manifest = f"{root}/data/manifest.parquet"
    train = ["train.num_steps=2", "train.batch_size=2", "train.cpu_threads=1", "train.checkpoint_every=2"]
    clips = [f"clips.manifest={manifest}", "clips.num_frames=4"]
    ardiff("train-vae", *clips, *section("vae", VAE), *train, f"output={tmp_path}/vae").expect(0)
    scored = ["--metrics", "psnr", "--num-clips", "2", "--frames", "8", "--partitions", "0", "--resolution", "32"]
    ardiff("evaluate", "--real", manifest, "--fake", f"{root}/plain/test", *scored, "--output", f"{tmp_path}/s").expect(
        0
    )
    scores = {score.metric: score.score for score in read_scores(f"{tmp_path}/s")}
    assert scores["psnr"] == pytest.approx(100.0)
