"""A training run that is killed and resumed ends with the same bits as a run without interruption."""

import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from jobs import PATIENCE, Jobs, Result
from resuming import (
    STEPS,
    assert_equal_checkpoints,
    assert_equal_files,
    kill_and_compare,
    last_checkpoint,
    wait_for_checkpoint,
)

from ardiff.data.streams import LatentStream
from ardiff.errors import TrainingError
from ardiff.train.config import TrainConfig
from ardiff.train.tasks import Task
from ray_jobs.training.job import TrainJob
from ray_jobs.training.trainer import run_training

pytestmark = pytest.mark.ray

Command = Callable[..., Result]
TRAIN = [f"train.num_steps={STEPS}", "train.checkpoint_every=10", "train.log_every=10", "train.cpu_threads=1"]
SIZES = {"num_frames": 8, "num_tokens": 2, "token_dim": 4, "width": 32, "depth": 2, "num_heads": 2}


@pytest.mark.slow
def test_dit_training_survives_sigkill(
    jobs: Jobs, ardiff: Command, cluster: None, latents: Path, tmp_path: Path
) -> None:
    settings = [f"latents={latents}", "files_per_chunk=2", "dit.num_classes=3", "train.batch_size=8", *TRAIN]
    settings += [f"dit.{name}={value}" for name, value in SIZES.items()]
    kill_and_compare(jobs, ardiff, tmp_path, "train-dit", settings, "pipeline/dit.safetensors")

    # The folder of a finished run refuses another model and does not change.
    whole = tmp_path / "whole"
    before = _files(whole)
    assert yaml.safe_load((whole / "config.yaml").read_text())["dit"]["width"] == 32
    result = ardiff("train-dit", "--output", whole, *settings, "dit.width=64")
    assert result.code == 1
    assert "another configuration" in result.complaint
    assert _files(whole) == before

    # As after a kill while Ray Train wrote its list of checkpoints: the list is cut off, and the last one is gone.
    shutil.rmtree(last_checkpoint(whole))
    snapshot_file = whole / "ray" / "checkpoint_manager_snapshot.json"
    snapshot_file.write_text(snapshot_file.read_text()[:100])
    err = ardiff("train-dit", "--output", whole, *settings).expect(0)
    assert re.search(r"is damaged\. It was renamed", err)
    assert f"resuming from the checkpoint of step {STEPS - 10}" in err
    assert_equal_checkpoints(whole, tmp_path / "broken")
    assert_equal_files(whole / "pipeline" / "dit.safetensors", tmp_path / "broken" / "pipeline" / "dit.safetensors")
    assert len(list((whole / "ray").glob("checkpoint-*"))) == 2


def test_ctrl_c_ends_training_as_interrupted(jobs: Jobs, latents: Path, tmp_path: Path) -> None:
    settings = [f"latents={latents}", "train.batch_size=8", *TRAIN, "train.num_steps=1000000"]
    settings += [f"dit.{name}={value}" for name, value in SIZES.items()]
    process = jobs.start("train_dit", "--output", str(tmp_path), *settings)
    wait_for_checkpoint(tmp_path, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, err
    assert err.rstrip().endswith("The same command resumes (without resume=none).")
    assert "Traceback" not in err
    assert jobs.left_over() == []


@pytest.mark.slow
def test_attempts_that_fail_alike_end_although_any_number_may_fail(
    cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def make_task() -> Task:
        raise ValueError("[/no] such layer")

    job = TrainJob(
        name="test",
        folder=str(tmp_path),
        fingerprint="key",
        config=TrainConfig(num_steps=5, max_failures=-1, cpu_threads=1, device="cpu"),
        stream=LatentStream(["none"], [16], (4, 2, 4), seed=0, files_per_chunk=1),
        make_task=make_task,
        record=tmp_path.exists,
        description={},
        result="",
    )
    told = "worker 0 while building the model: ValueError: [/no] such layer"
    with pytest.raises(TrainingError, match=f"3 times in the same way, .*: {re.escape(told)}"):
        run_training(job)
    assert capsys.readouterr().err.count(f"An attempt failed: {told}") == 3


@pytest.mark.slow
def test_vae_training_survives_sigkill(
    jobs: Jobs, ardiff: Command, cluster: None, manifest: Path, tmp_path: Path
) -> None:
    sizes = {"resolution": 32, "patch_size": 8, "num_tokens": 4, "width": 32, "depth": 1, "num_heads": 2}
    settings = [f"clips.manifest={manifest}", "clips.num_frames=4", "clips.horizontal_flip=true", *TRAIN]
    settings += ["train.batch_size=4", "train.gradient_accumulation=2", f"task.temporal_from_step={STEPS // 2}"]
    settings += [f"vae.{name}={value}" for name, value in {**sizes, "temporal_window": 4}.items()]
    kill_and_compare(jobs, ardiff, tmp_path, "train-vae", settings, "model/vae.safetensors")


def _files(folder: Path) -> dict[str, bytes]:
    """All files but the empty one by which Ray checks that it can write."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".validate_storage_marker")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}
