"""``--log json``: every process of a run logs lines that a program reads, and each says where it comes from."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Jobs

pytestmark = pytest.mark.ray

SIZES = {"num_frames": 8, "num_tokens": 2, "token_dim": 4, "width": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
TRAIN = ["train.batch_size=8", "train.num_steps=20", "train.checkpoint_every=10", "train.log_every=5"]
TRAIN += ["train.cpu_threads=1", "train.loading_tasks=1", "train.num_workers=2", "train.max_failures=0"]


def objects(text: str) -> list[dict[str, Any]]:
    """The lines that are JSON."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def worker_lines(jobs: Jobs) -> list[dict[str, Any]]:
    """What the processes on the cluster logged, from where an agent on a node collects it."""
    files = Path(jobs.ray_folder).glob("ray/session_2*/logs/worker-*.err")
    return [line for file in files for line in objects(file.read_text())]


def test_driver_and_workers_log_run_rank_and_step(jobs: Jobs, latents: Path, tmp_path: Path) -> None:
    settings = [f"latents={latents}", *[f"dit.{name}={value}" for name, value in SIZES.items()], *TRAIN]
    result = jobs.run("train_dit", "--log", "json", f"output={tmp_path}/first", *settings)
    assert result.code == 0, result.err
    said = objects(result.err)
    assert said, result.err
    assert all((line["run"], line["job"]) == ("first", "train-dit") for line in said)
    [end] = [line for line in said if line.get("stage") == "train-dit"]
    assert end["message"].startswith("✓ train-dit: ")
    assert end["seconds"] > 0
    assert [line["total"] for line in said if line.get("completed") == 20] == [20]
    assert "AR-DiT: 20/20" not in [line for line in result.err.splitlines() if not line.startswith("{")]

    lines = [line for line in worker_lines(jobs) if line["run"] == "first"]
    ranks = {(line["rank"], line["world_size"]) for line in lines if line["message"] == "training begins"}
    assert ranks == {(0, 2), (1, 2)}
    metrics = [line for line in lines if line["message"] == "metrics"]
    assert [(line["rank"], line["step"]) for line in metrics] == [(0, step) for step in (5, 10, 15, 20)]
    history = json.loads((tmp_path / "first" / "history.json").read_text())
    assert [[line["step"], line["loss"]] for line in metrics] == history["loss"]
    stored = {(line["rank"], line["step"]) for line in lines if line["message"] == "checkpoint stored"}
    assert stored == {(rank, step) for rank in (0, 1) for step in (10, 20)}
    assert {"time", "level", "logger", "host"} <= metrics[0].keys()

    # What fails says on which worker and at which step, and the driver why.
    result = jobs.run("train_dit", f"output={tmp_path}/second", *settings, "train.optimizer.lr=1e30", "--log=json")
    assert result.code == 1
    [reason] = [line for line in objects(result.err) if line["level"] == "ERROR"]
    found = re.match(r"The (loss|gradient) is .* at step (\d+)", reason["message"])
    assert found, reason
    assert reason["run"] == "second"
    lines = [line for line in worker_lines(jobs) if line["run"] == "second"]
    failed = [line for line in lines if line["level"] == "ERROR" and "TrainingError" in line.get("exception", "")]
    assert failed
    assert {line["rank"] for line in failed} <= {0, 1}  # as soon as one has failed, the other is ended
    assert {line["step"] for line in failed} == {int(found[2])}


def test_encoding_names_the_folder_that_it_made(jobs: Jobs, latents: Path, manifest: Path, tmp_path: Path) -> None:
    settings = [f"manifest={manifest}", f"vae={latents}/vae", f"output={tmp_path}", "num_frames=8"]
    result = jobs.run("encode", "--log", "json", *settings)
    assert result.code == 0, result.err
    [description] = tmp_path.glob("*/latents.json")
    assert [line["folder"] for line in objects(result.err) if "folder" in line] == [str(description.parent)]
