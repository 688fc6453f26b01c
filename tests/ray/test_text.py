"""Captions from files beside the videos to a trained AR-DiT: ``prepare``, ``encode`` and ``train-dit`` on a real S3."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import broken_videos
import numpy as np
import pytest
from jobs import Result
from s3_server import S3Server, environment
from text_encoders import WIDTH, write_encoder

from ardiff.data import storage
from ardiff.data.latents import read_description
from ardiff.data.manifest import read_manifest
from ardiff.data.texts import TextIndex, read_index, read_texts
from ardiff.pretrained import save_autoencoder
from ardiff.text.encoder import TextEncoder

pytestmark = pytest.mark.ray
Command = Callable[..., Result]
CAPTIONS = {"a": "a red ring\na ring moves right\n", "b": "a blue square", "c": ""}


@pytest.fixture(scope="module")
def bucket(cluster: None, s3_server: S3Server) -> Iterator[str]:
    with environment(s3_server.environment()):
        yield f"s3://{s3_server.make_bucket()}"


def write_videos(folder: str, names: str) -> None:
    for number, name in enumerate(names):
        storage.write_bytes(f"{folder}/train/{name}.mp4", broken_videos.encode(crf=10 + number))
    storage.write_bytes(f"{folder}/test/t.mp4", broken_videos.encode())


def text_folders(latents: str) -> list[str]:
    return sorted(f.removesuffix("/texts.json") for f in storage.list_files(latents) if f.endswith("texts.json"))


def test_captions_from_files_to_training(ardiff: Command, bucket: str, make_vae: Any, tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "encoder")
    save_autoencoder(f"{bucket}/vae", make_vae())
    write_videos(f"{bucket}/videos", "abc")
    for name, text in CAPTIONS.items():
        storage.write_bytes(f"{bucket}/videos/train/{name}.txt", text.encode())
    data = ["prepare", f"{bucket}/videos", f"{bucket}/data"]
    said = ardiff(*data).expect(0)
    assert "captions: 3, of 2 videos; 2 videos have none" in said
    assert "not taken" not in said

    command = ["encode", f"manifest={bucket}/data/manifest.parquet", f"vae={bucket}/vae", f"output={bucket}/latents"]
    command += ["num_frames=4", "clip_step=8", "clips_per_file=4", f"text.encoder={encoder}"]
    said = ardiff(*command).expect(0)
    assert "3 captions encoded, 0 were there; 1 of 3 videos have none" in said
    [folder] = text_folders(f"{bucket}/latents")
    latents = folder.rpartition("/")[0]
    description, model = read_texts(folder), TextEncoder.load(encoder)
    assert folder == f"{latents}/text-{model.fingerprint}"
    assert (description.encoder.uri, description.encoder.dim, description.longest) == (encoder, WIDTH, 6)
    index = TextIndex.open(folder, description)
    for row, caption in enumerate(["a red ring", "a ring moves right"]):
        states, mask = index.load(index.choose([f"{bucket}/videos/train/a.mp4"], np.array([row / 2])))
        expected = model([caption])[0][0].numpy()
        assert mask.sum() == len(expected)
        np.testing.assert_allclose(states[0][mask[0]], expected, atol=2e-3)

    # Other captions change no latents, and only what is new is encoded; another limit is another set.
    before = storage.read_bytes(f"{latents}/latents.json")
    storage.write_bytes(f"{bucket}/videos/train/c.txt", b"a plus stops")
    storage.write_bytes(f"{bucket}/videos/train/b.txt", b"a red ring")
    assert "0 videos are new or changed" in ardiff(*data).expect(0)
    said = ardiff(*command).expect(0)
    assert "0 clips encoded" in said
    assert "1 captions encoded, 2 were there; 0 of 3 videos have none" in said
    changed = read_texts(folder)
    assert changed.content != description.content
    assert read_index(folder, changed)["caption"].to_pylist() == [
        "a red ring",
        "a ring moves right",
        "a red ring",
        "a plus stops",
    ]
    said = ardiff(*command, "text.max_tokens=4").expect(0)
    assert "3 captions encoded, 0 were there, 3 truncated to 4 tokens" in said
    assert storage.read_bytes(f"{latents}/latents.json") == before
    assert len(text_folders(latents)) == 2
    said = ardiff(*command, "text.max_tokens=4", "text.too_long=error").expect(1)
    assert "3 captions have more than the 4 tokens" in said
    assert "has captions encoded in float32: set text.dtype" in ardiff(*command, "text.dtype=bfloat16").expect(2)

    train_on(ardiff, latents, folder, tmp_path)
    storage.write_bytes(f"{bucket}/videos/train/b.txt", b"a blue plus")
    ardiff(*data).expect(0)
    ardiff(*command).expect(0)
    said = ardiff(*training(latents, tmp_path), f"data.text_encoder={model.fingerprint}", "train.num_steps=4").expect(1)
    assert "was made with another configuration or other data" in said


def training(latents: str, folder: Path) -> list[str]:
    sizes = {"num_tokens": 2, "token_dim": 4, "num_frames": 4, "width": 16, "depth": 1, "num_heads": 2}
    command = ["train-dit", f"latents={latents}", f"output={folder}/dit", *(f"dit.{k}={v}" for k, v in sizes.items())]
    return [*command, "dit.condition=cross_attention", f"dit.condition_dim={WIDTH}", "train.batch_size=4"]


def train_on(ardiff: Command, latents: str, folder: str, tmp_path: Path) -> None:
    """What does not fit is refused; then two steps of training, one of which resumes."""
    assert len(read_description(latents).files) > 1
    command, encoder = training(latents, tmp_path), f"data.text_encoder={folder[-16:]}"
    assert "has texts by several encoders: set data.text_encoder to one of" in ardiff(*command).expect(2)
    said = ardiff(*command, encoder, "dit.condition_dim=8").expect(2)
    assert f"dit.condition_dim is 8, but the token states of the text encoder {tmp_path}/encoder have width 16" in said
    assert "data.source=clips has no texts" in ardiff(*command, "data.source=clips", "data.vae=x").expect(2)
    said = ardiff(*command, encoder, "dit.condition=modulation").expect(2)
    assert "data.text_encoder is for a model with text" in said
    assert not Path(tmp_path, "dit").exists()
    ardiff(*command, encoder, "train.num_steps=2").expect(0)


def test_without_captions_the_job_stops_before_it_encodes(
    ardiff: Command, bucket: str, make_vae: Any, tmp_path: Path
) -> None:
    encoder = write_encoder(tmp_path / "encoder")
    save_autoencoder(f"{tmp_path}/vae", make_vae())
    write_videos(f"{tmp_path}/videos", "a")
    assert "captions: none" in ardiff("prepare", f"{tmp_path}/videos", f"{tmp_path}/data").expect(0)
    command = ["encode", f"manifest={tmp_path}/data/manifest.parquet", f"vae={tmp_path}/vae", "num_frames=4"]
    said = ardiff(*command, f"output={tmp_path}/latents", f"text.encoder={encoder}").expect(1)
    assert "No training video has a caption" in said
    assert all(not r.captions for r in read_manifest(f"{tmp_path}/data/manifest.parquet"))
    said = ardiff(*command, f"output={tmp_path}/latents", "text.encoder=/no/such/folder").expect(1)
    assert "There is no text encoder in /no/such/folder" in said
    assert not (tmp_path / "latents").exists()
