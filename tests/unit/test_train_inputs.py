"""What identifies the data of a training run: content of the videos, AR-VAE of the latents, statistics."""

import contextlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ardiff.data.config import ClipConfig
from ardiff.data.latents import LatentSet, LatentStatistics, vae_fingerprint, write_description
from ardiff.data.manifest import VideoRecord, write_manifest
from ardiff.diffusion.config import DiffusionConfig
from ardiff.errors import CheckpointError, ConfigError
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.pretrained import save_autoencoder
from ardiff.train.export import describe_dit, write_trained
from ray_jobs import train_vae
from ray_jobs.training import dit_data
from ray_jobs.training.config import DiTDataConfig, TrainDiTConfig, TrainVAEConfig

VIDEO = VideoRecord("a.mp4", 9, "h264", 64, 64, 8.0, 40, 0, "a", "train", "ok", "", etag="1")
LATENTS = LatentSet("key", 8, 2, 4, ["a"], ["part.parquet"], [4], LatentStatistics.neutral(2, 4), "vae")


def fingerprint_of(manifest: Path, records: list[VideoRecord], monkeypatch: pytest.MonkeyPatch) -> str:
    """The fingerprint of an AR-VAE training run on these videos."""
    jobs: list[Any] = []
    manifest.parent.mkdir(exist_ok=True)
    write_manifest(str(manifest), records)
    monkeypatch.setattr(train_vae, "run_training", lambda job: jobs.append(job) or {"loss": [[1, 0.5]]})
    nothing = contextlib.nullcontext(SimpleNamespace())
    for name in ("ray_cluster", "training_error_log", "stage"):
        monkeypatch.setattr(train_vae, name, lambda *arguments: nothing)
    train_vae.run(TrainVAEConfig(clips=ClipConfig(manifest=str(manifest))))
    return str(jobs[0].fingerprint)


def test_the_fingerprint_is_of_the_videos_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(VIDEO, uri="b.mp4", label=1, class_name="b")
    whole = fingerprint_of(tmp_path / "one" / "manifest.parquet", [VIDEO, other], monkeypatch)
    assert fingerprint_of(tmp_path / "two" / "manifest.parquet", [VIDEO, other], monkeypatch) == whole
    for changed in ([other, VIDEO], [VIDEO], [replace(VIDEO, etag="2"), other], [replace(VIDEO, label=1), other]):
        assert fingerprint_of(tmp_path / "one" / "manifest.parquet", changed, monkeypatch) != whole


def test_latents_are_checked_against_the_vae_that_the_pipeline_gets(tmp_path: Path, make_vae: Any) -> None:
    place = str(tmp_path / "vae")
    save_autoencoder(place, make_vae())
    known = replace(LATENTS, vae=place, vae_fingerprint=vae_fingerprint(place))
    write_description(str(tmp_path / "latents"), known)
    config = TrainDiTConfig(latents=str(tmp_path / "latents"))
    assert dit_data.stored_latents(config) == known
    moved = str(tmp_path / "moved")
    save_autoencoder(moved, make_vae())
    assert dit_data.stored_latents(replace(config, data=DiTDataConfig(vae=moved))).vae == moved
    save_autoencoder(place, make_vae(seed=1))  # trained again in the same place
    with pytest.raises(ConfigError, match=r"were made by the AR-VAE .* but .* run `ardiff encode`"):
        dit_data.stored_latents(config)


def test_a_pipeline_gets_the_vae_of_its_latents(tmp_path: Path, make_vae: Any, make_dit: Any) -> None:
    place, dit = str(tmp_path / "vae"), make_dit()
    save_autoencoder(place, make_vae())
    latents = replace(LATENTS, vae=place, vae_fingerprint=vae_fingerprint(place))
    description = describe_dit(dit.config, DiffusionConfig(), latents, ["a", "b", "c"])
    write_trained(description, dit.state_dict(), str(tmp_path / "pipeline"))
    ARDiffusionPipeline.from_pretrained(str(tmp_path / "pipeline"))
    save_autoencoder(place, make_vae(seed=1))
    with pytest.raises(CheckpointError, match=r"no longer the AR-VAE .*`ardiff export"):
        write_trained(description, dit.state_dict(), str(tmp_path / "pipeline"))
    write_trained({**description, "vae_fingerprint": ""}, dit.state_dict(), str(tmp_path / "pipeline"))


def test_cached_statistics_are_of_the_training_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ComputedError(Exception):
        pass

    def compute(*arguments: Any) -> None:
        raise ComputedError

    monkeypatch.setattr(dit_data, "remote_progress", compute)
    config, stream = TrainDiTConfig(output=str(tmp_path)), SimpleNamespace(locate=lambda position: (0, position))
    kept = {"source": dit_data.fingerprint("these", config.train.seed), **asdict(LATENTS.statistics)}
    (tmp_path / "statistics.json").write_text(json.dumps(kept))
    assert dit_data.clip_statistics(config, stream, "these") == LATENTS.statistics  # type: ignore[arg-type]
    for again, source in ((config, "others"), (replace(config, resume="none"), "these")):
        with pytest.raises(ComputedError):
            dit_data.clip_statistics(again, stream, source)  # type: ignore[arg-type]
