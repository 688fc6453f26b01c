"""The record of a stage, and what a run says it is made of."""

from pathlib import Path

import pytest

from ray_jobs.runtime import stages
from ray_jobs.runtime.stages import read_stage, stage, versions


def test_an_interruption_counts_once(tmp_path: Path) -> None:
    """In the run that goes on after it, and not in those that come later."""
    with pytest.raises(KeyboardInterrupt), stage("work", str(tmp_path), ""):
        raise KeyboardInterrupt
    (tmp_path / "interrupted.json").write_text("100.0")
    seconds = []
    for _ in range(2):
        with stage("work", str(tmp_path), ""):
            pass
        record = read_stage(str(tmp_path))
        assert record is not None
        seconds.append(record.seconds)
    assert seconds[0] >= 100 > seconds[1]


def test_a_machine_without_git_does_not_know_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(stages.COMMIT, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert versions()["git"] == "unknown"
