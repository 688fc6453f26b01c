"""The AR-DiT's training data from a manifest."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from ardiff.config import build
from ardiff.data.config import ClipConfig
from ardiff.data.latents import LatentSet, LatentStatistics, latent_table, write_description
from ardiff.data.manifest import VideoRecord
from ardiff.data.texts import UsedEncoder, stored_captions, text_folder, write_text_shard, write_texts
from ardiff.errors import ConfigError
from ardiff.pretrained import save_autoencoder
from ray_jobs.training import dit_data
from ray_jobs.training.config import DiTDataConfig, TrainDiTConfig
from ray_jobs.training.dit_data import latents_of_clips, make_stream, stored_texts


def test_classes_without_a_training_video_keep_their_numbers(tmp_path: Path, make_vae: Any) -> None:
    save_autoencoder(str(tmp_path), make_vae())
    rows = [("apes", 0, 16), ("bats", 1, 3), ("cats", 2, 16)]
    manifest = [VideoRecord(n, 1, "h264", 9, 9, 8.0, f, i, n, "train", "ok", "") for n, i, f in rows]
    config = TrainDiTConfig(data=DiTDataConfig(source="clips", vae=str(tmp_path), clips=ClipConfig(num_frames=8)))
    latents, records = latents_of_clips(config, manifest)
    assert latents.class_names == ["apes", "bats", "cats"]
    assert [r.label for r in records] == [0, 2]


@pytest.fixture
def with_texts(tmp_path: Path) -> LatentSet:
    """Two files of latents, and the texts of an encoder of width 8."""
    files = ["a.parquet", "b.parquet"]
    for file in files:
        columns = {"uri": ["x", "y"], "label": [0, 0], "latents": np.zeros((2, 4, 2, 4), np.float32)}
        pq.write_table(latent_table(columns), tmp_path / file)
    statistics = LatentStatistics([[0.0] * 4] * 2, 1.0)
    latents = LatentSet("f", 4, 2, 4, ["all"], files, [2, 2], statistics, "vae", content="clips")
    write_description(str(tmp_path), latents)
    write_captions(tmp_path, "one")
    return latents


def write_captions(latents: Path, caption: str) -> None:
    encoder = UsedEncoder(uri="e", fingerprint="ab", dim=8, max_tokens=9, dtype="float32")
    folder = text_folder(str(latents), "ab")
    write_text_shard(folder, [caption], [np.ones((3, 8), np.float16)], "float32")
    write_texts(folder, encoder, {"x": (caption,)}, stored_captions(folder, "float32"))


def text_config(latents: Path, **changes: Any) -> TrainDiTConfig:
    dit = {"num_frames": 4, "num_tokens": 2, "condition": "cross_attention", "condition_dim": 8}
    tree = {"latents": str(latents), "dit": dit | changes.pop("dit", {}), **changes}
    return build(TrainDiTConfig, tree)


def test_a_model_with_text_trains_with_the_stored_texts(tmp_path: Path, with_texts: LatentSet) -> None:
    config = text_config(tmp_path)
    texts = stored_texts(config, with_texts)
    stream, key = make_stream(config, with_texts, [], texts, None)
    samples = stream.load(0)
    assert samples["text"].shape == (4, 3, 8)
    assert samples["text_mask"].any(axis=1).sum() == 2  # those of x; y has no caption
    plain = text_config(tmp_path, dit={"condition": "modulation"})
    assert stored_texts(plain, with_texts) is None
    without, plain_key = make_stream(plain, with_texts, [], None, None)
    assert set(without.load(0)) == {"latents", "label"}
    write_captions(tmp_path, "another")
    assert len({plain_key, key, make_stream(config, with_texts, [], stored_texts(config, with_texts), None)[1]}) == 3


def test_texts_that_do_not_fit_are_refused(
    tmp_path: Path, with_texts: LatentSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"dit\.condition_dim is 9, but the token states of the text encoder e have"):
        stored_texts(text_config(tmp_path, dit={"condition_dim": 9}), with_texts)
    with pytest.raises(ConfigError, match=r"data\.source=clips has no texts"):
        text_config(tmp_path, data={"source": "clips", "vae": "x"})
    with pytest.raises(ConfigError, match=r"data\.text_encoder is for a model with text"):
        text_config(tmp_path, dit={"condition": "modulation"}, data={"text_encoder": "ab"})
    monkeypatch.setattr(dit_data, "MAX_CHUNK_TEXT_BYTES", 4 * 3 * 8 * 2 - 1)
    with pytest.raises(ConfigError, match=r"captions of the 4 clips .* lower files_per_chunk"):
        stored_texts(text_config(tmp_path), with_texts)
    assert stored_texts(text_config(tmp_path, files_per_chunk=1), with_texts) is not None
