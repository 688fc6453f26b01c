"""``--log json``: every process of a run logs lines that programs can read, and each line names its source."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from jobs import Jobs

from ardiff.data.latents import latent_table
from ardiff.data.streams import LatentStream

pytestmark = pytest.mark.ray

SIZES = {"num_frames": 8, "num_tokens": 2, "token_dim": 4, "width": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
TRAIN = ["train.batch_size=8", "train.num_steps=20", "train.checkpoint_every=10", "train.log_every=5"]
TRAIN += ["train.cpu_threads=1", "train.loading_tasks=1", "train.num_workers=2", "train.max_failures=0"]


def objects(text: str) -> list[dict[str, Any]]:
    """The lines that are JSON."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def worker_lines(jobs: Jobs) -> list[dict[str, Any]]:
    """The lines of the processes on the cluster, from the files that a log collector on a node reads."""
    files = Path(jobs.ray_folder).glob("ray/session_2*/logs/worker-*.err")
    return [line for file in files for line in objects(file.read_text())]


@pytest.fixture
def poisoned(latents: Path, tmp_path: Path) -> Path:
    """The latents with infinite values in the file that is read third, after 15 updates."""
    folder = tmp_path / "poisoned"
    shutil.copytree(latents, folder)
    files = [f"part-{i}.parquet" for i in range(5)]
    third = LatentStream(files, [60] * 5, (8, 2, 4), seed=0, files_per_chunk=1).names(2)[0].split()[0]
    columns = {"latents": np.full((60, 8, 2, 4), np.inf), "label": np.arange(60) % 3}
    pq.write_table(latent_table(columns), folder / third)
    return folder


@pytest.mark.slow
def test_workers_log_rank_and_step_and_a_failure_names_both(jobs: Jobs, poisoned: Path, tmp_path: Path) -> None:
    settings = [f"latents={poisoned}", "files_per_chunk=1", *[f"dit.{name}={value}" for name, value in SIZES.items()]]
    result = jobs.run("train_dit", "--log", "json", f"output={tmp_path}/first", *settings, *TRAIN)
    assert result.code == 1
    driver_lines = objects(result.err)
    assert all((line["run"], line["job"]) == ("first", "train-dit") for line in driver_lines)
    [reason] = [line for line in driver_lines if line["level"] == "ERROR"]
    match = re.match(r"The (loss|gradient) is .* at step (\d+)", reason["message"])
    assert match, reason
    assert match[2] == "15"  # updates made before

    lines = worker_lines(jobs)
    assert {(line["run"], line["job"]) for line in lines} == {("first", "train-dit")}
    ranks = {(line["rank"], line["world_size"]) for line in lines if line["message"] == "training starts"}
    assert ranks == {(0, 2), (1, 2)}
    metrics = [line for line in lines if line["message"] == "metrics"]
    assert [(line["rank"], line["step"]) for line in metrics] == [(0, step) for step in (5, 10, 15)]
    history = json.loads((tmp_path / "first" / "history.json").read_text())  # as of the last checkpoint
    assert [[line["step"], line["loss"]] for line in metrics[:2]] == history["loss"]
    stored = {(line["rank"], line["step"]) for line in lines if line["message"] == "checkpoint stored"}
    assert stored == {(rank, 10) for rank in (0, 1)}
    assert {"time", "level", "logger", "host"} <= metrics[0].keys()
    failed = [line for line in lines if line["level"] == "ERROR" and "TrainingError" in line.get("exception", "")]
    assert failed
    assert {line["rank"] for line in failed} <= {0, 1}  # Ray Train ends the other worker as soon as one has failed
    assert {line["step"] for line in failed} == {15}


def test_the_driver_logs_progress_the_stage_and_the_folder_of_latents(
    jobs: Jobs, latents: Path, manifest: Path, tmp_path: Path
) -> None:
    output = tmp_path / "set"
    settings = [f"manifest={manifest}", f"vae={latents}/vae", f"output={output}", "num_frames=8"]
    result = jobs.run("encode", "--log", "json", *settings)
    assert result.code == 0, result.err
    lines = objects(result.err)
    assert all((line["run"], line["job"]) == ("set", "encode") for line in lines)
    [description] = output.glob("*/latents.json")
    assert [line["folder"] for line in lines if "folder" in line] == [str(description.parent)]
    [end] = [line for line in lines if line.get("stage") == "encode"]
    assert end["message"].startswith("✓ encode: ")
    assert end["seconds"] > 0
    assert [line["total"] for line in lines if line.get("completed") == 8] == [8]
    assert "8/8" not in "".join(line for line in result.err.splitlines() if not line.startswith("{"))
