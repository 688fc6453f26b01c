"""Trackers of training runs, with their own packages: what they store, and that a restart continues the run."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ardiff.data.decode import decode_clip
from ardiff.data.encode import contact_sheet
from ardiff.errors import ConfigError
from ardiff.train.config import TrainConfig
from ray_jobs.training.job import TrainJob
from ray_jobs.training.trackers import make_trackers

VIDEO = np.stack([np.full((16, 24, 3), 60 * t, np.uint8) for t in range(4)])
SHEET = contact_sheet(VIDEO[None])


def job(folder: object, *trackers: Any) -> TrainJob:
    nothing: Any = None
    config = TrainConfig(trackers=trackers, project="shapes")
    return TrainJob("test", str(folder), "key", config, nothing, nothing, nothing, {}, "")


def run_twice(folder: Path, tracker: str) -> None:
    """A run that ends without closing after step 2, and its restart from step 1."""
    [first] = make_trackers(job(folder, tracker), 0)
    first.log(1, {"loss": 3.0})
    first.log_samples(1, SHEET, VIDEO)
    first.log(2, {"loss": 2.0})
    first.flush()
    [second] = make_trackers(job(folder, tracker), 1)
    second.log(2, {"loss": 1.0, "loss by t: 0-249": 5.0})
    second.flush()
    second.close()


def test_tensorboard_hides_what_is_repeated(tmp_path: Path) -> None:
    run_twice(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 3.0), (2, 1.0)]
    [sheet] = events.Images("samples")
    with Image.open(io.BytesIO(sheet.encoded_image_string)) as picture, Image.open(io.BytesIO(SHEET)) as expected:
        assert picture.size == expected.size
    [video] = events.Images("sample_videos")
    with Image.open(io.BytesIO(video.encoded_image_string)) as picture:
        assert (picture.format, picture.n_frames, picture.size) == ("GIF", 4, (24, 16))  # type: ignore[attr-defined]


def test_mlflow_continues_its_run_in_a_file_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_twice(tmp_path, "mlflow")
    client = MlflowClient((tmp_path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("shapes")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"loss": 1.0, "loss by t_ 0-249": 5.0}
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 2]
    files = [f.path for f in client.list_artifacts(run.info.run_id, "samples")]
    assert files == ["samples/step-000001.mp4", "samples/step-000001.png"]
    video = Path(client.download_artifacts(run.info.run_id, files[0])).read_bytes()
    assert decode_clip(video, 0, 4).mean(axis=(1, 2, 3)) == pytest.approx([0, 60, 120, 180], abs=3)


def test_mlflow_needs_a_server_for_a_remote_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="needs MLFLOW_TRACKING_URI, because s3://bucket/run is not local"):
        make_trackers(job("s3://bucket/run", "mlflow"), 0)


def test_wandb_writes_offline_runs_with_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    [tracker] = make_trackers(job(tmp_path, "wandb"), 0)
    tracker.log(1, {"loss": 3.0})
    tracker.log_samples(1, SHEET, VIDEO)
    tracker.flush()
    tracker.close()
    [again] = make_trackers(job(tmp_path, "wandb"), 1)
    assert again.run.id == tracker.run.id  # type: ignore[attr-defined]
    assert again.run.project == "shapes"  # type: ignore[attr-defined]
    again.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/samples_*.png"))
    [video] = tmp_path.glob("wandb/offline-run-*/files/media/videos/sample_videos_*.mp4")
    assert decode_clip(video.read_bytes(), 0, 4).shape == (4, 16, 24, 3)


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_missing_package_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"names {package}, .*pip install 'ardiff\[trackers\]'"):
        make_trackers(job(tmp_path, package), 0)


def test_trackers_are_chosen_together_and_checked(tmp_path: Path) -> None:
    assert make_trackers(job(tmp_path), 0) == []
    with pytest.raises(ValueError, match="trackers must differ"):
        TrainConfig(trackers=("wandb", "wandb"))
