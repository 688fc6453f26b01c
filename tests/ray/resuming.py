"""Helpers for tests of interrupted training: how far a run has come, and whether two runs ended with the same bits."""

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from jobs import PATIENCE
from safetensors.torch import load_file

from ardiff.train.shards import GROUPS


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
