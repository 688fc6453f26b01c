"""The AR-DiT's training data from a manifest."""

from pathlib import Path
from typing import Any

from ardiff.data.config import ClipConfig
from ardiff.data.manifest import VideoRecord
from ardiff.pretrained import save_autoencoder
from ray_jobs.training.config import DiTDataConfig, TrainDiTConfig
from ray_jobs.training.dit_data import latents_of_clips


def test_classes_without_a_training_video_keep_their_numbers(tmp_path: Path, make_vae: Any) -> None:
    save_autoencoder(str(tmp_path), make_vae())
    rows = [("apes", 0, 16), ("bats", 1, 3), ("cats", 2, 16)]
    manifest = [VideoRecord(n, 1, "h264", 9, 9, 8.0, f, i, n, "train", "ok", "") for n, i, f in rows]
    config = TrainDiTConfig(data=DiTDataConfig(source="clips", vae=str(tmp_path), clips=ClipConfig(num_frames=8)))
    latents, records = latents_of_clips(config, manifest)
    assert latents.class_names == ["apes", "bats", "cats"]
    assert [r.label for r in records] == [0, 2]
