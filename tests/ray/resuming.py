"""Helpers for tests of interrupted training: how far a run has come, and whether two runs ended with the same bits."""

import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jobs import PATIENCE, Jobs, Result
from safetensors.torch import load_file

from ardiff.train.shards import GROUPS

STEPS = 120
"""Training steps of a run that :func:`kill_and_compare` kills."""


def wait_for_checkpoint(folder: Path, process: "subprocess.Popen[str] | None" = None) -> int:
    """Waits until Ray Train lists a checkpoint of the run in ``folder``. Fails if ``process``, its job, ends before.

    Returns the step of the latest checkpoint.
    """
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert process is None or process.poll() is None, process.communicate()
        try:
            return int(snapshot(folder)["metrics"]["step"])
        except (OSError, ValueError, TypeError):  # none yet, or half of one
            time.sleep(0.02)
    raise AssertionError(f"no checkpoint in {PATIENCE} seconds")


def wait_for_line(log: Path, pattern: str, seconds: float = PATIENCE) -> None:
    """Waits until a line of the job's log matches."""
    deadline = time.monotonic() + seconds
    while not re.search(pattern, log.read_text()):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def snapshot(folder: Path) -> dict[str, Any]:
    """The latest checkpoint on Ray Train's list."""
    checkpoints = json.loads((folder / "ray" / "checkpoint_manager_snapshot.json").read_text())
    latest: dict[str, Any] = checkpoints["latest_checkpoint_result"]
    return latest


def assert_equal_files(one: Path, other: Path) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different
    assert one.read_bytes() == other.read_bytes()


def last_checkpoint(folder: Path) -> Path:
    """The folder of the latest checkpoint on Ray Train's list."""
    return folder / "ray" / str(snapshot(folder)["checkpoint_dir_name"])


def assert_equal_checkpoints(one: Path, other: Path) -> None:
    """The last checkpoints of two runs hold the same bits."""
    ends = [last_checkpoint(run) for run in (one, other)]
    files = sorted(file.name for part in GROUPS for file in ends[0].glob(f"{part}-*.safetensors"))
    assert files
    for name in files:
        assert_equal_files(ends[0] / name, ends[1] / name)
    assert (ends[0] / "state.json").read_text() == (ends[1] / "state.json").read_text()


def kill_and_compare(
    jobs: Jobs, ardiff: Callable[..., Result], folder: Path, job: str, settings: list[str], weights: str
) -> None:
    """Trains whole, and again with a kill and a resumption. Only the job that is killed has a process of its own."""
    whole, broken = folder / "whole", folder / "broken"
    assert "resuming" not in ardiff(job, "--output", whole, *settings).expect(0)

    process = jobs.start(job.replace("-", "_"), "--output", str(broken), *settings)
    seen = wait_for_checkpoint(broken, process)
    assert jobs.kill(process).code == -9
    assert not (broken / "stage.json").exists(), "the run ended before it could be killed: raise STEPS"
    assert not (broken / weights).exists()
    assert jobs.left_over() == []

    try:
        registered = snapshot(broken)["metrics"]["step"]
    except ValueError:  # killed while Ray wrote its list: the run resumes at the newest complete checkpoint
        complete = (broken / "ray").glob("checkpoint-*/state.json")
        registered = max(int(file.parent.name.split("-")[1]) for file in complete)
    assert seen <= registered < STEPS
    err = ardiff(job, "--output", broken, *settings).expect(0)
    assert re.findall(r"resuming from the checkpoint of step (\d+)", err) == [str(registered)]

    assert_equal_files(whole / weights, broken / weights)
    assert_equal_checkpoints(whole, broken)
    losses = [json.loads((run / "history.json").read_text())["loss"] for run in (whole, broken)]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(10, STEPS + 1, 10))
