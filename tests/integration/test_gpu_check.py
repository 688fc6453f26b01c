"""``ardiff gpu-check`` on a CPU with tiny models: every check runs, and what is wrong is said."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ardiff.errors import ArdiffError
from ardiff.gpu_check import command
from ardiff.gpu_check.command import run
from ardiff.gpu_check.config import GpuCheckConfig
from ardiff.gpu_check.setup import Row, Setup

CALL = "import sys; from ardiff.cli import main; raise SystemExit(main(sys.argv[1:]))"


def test_all_checks_on_a_cpu(tmp_path: Path) -> None:
    """In a process of its own, because it makes a process group."""
    arguments = ["gpu-check", "device=cpu", "compile=false", f"output={tmp_path}", "seconds=100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CALL, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu-check.json").read_text())
    assert result["notes"] == {}
    assert {row["check"] for row in result["rows"]} == set(GpuCheckConfig().checks)
    assert all(row["ok"] for row in result["rows"])
    table = (tmp_path / "gpu-check.md").read_text()
    assert "| exactness | masked, plain, fp32 |" in table
    assert "| checkpoints | of zero3, read by all | 0 | 0 |" in table


def test_what_fails_is_said_and_the_rest_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(setup: Setup) -> Iterator[Row]:
        yield Row("exactness", "masked", 0.5, "rms", 1e-3)
        yield Row("exactness", "ragged", float("nan"), "rms", 1e-3)

    def broken(setup: Setup) -> Iterator[Row]:
        yield Row("sampling", "frames", 3.0, "1/s")
        raise RuntimeError("CUDA error: no kernel image\nmore")

    def fine(setup: Setup) -> Iterator[Row]:
        yield Row("features", "I3D", 1.0, "clips/s")

    checks = {"exactness": wrong, "sampling": broken, "features": fine}
    monkeypatch.setattr(command, "CHECKS", checks)
    config = GpuCheckConfig(device="cpu", output=str(tmp_path), checks=("exactness", "sampling", "features"))
    with pytest.raises(ArdiffError, match="are wrong: exactness, masked; exactness, ragged; sampling"):
        run(config)
    result = json.loads((tmp_path / "gpu-check.json").read_text())
    assert [row["ok"] for row in result["rows"]] == [False, False, True, True]
    assert result["notes"] == {"sampling": "failed: RuntimeError: CUDA error: no kernel image"}
    assert "| exactness | masked | 0.5 rms | 0.001 **exceeded** |" in (tmp_path / "gpu-check.md").read_text()


def test_no_check_begins_after_the_time_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(GpuCheckConfig(device="cpu", output=str(tmp_path), checks=("ceilings",), seconds=1e-9))
    assert "ceilings: skipped: 1e-09 s are over" in capsys.readouterr().out
    assert json.loads((tmp_path / "gpu-check.json").read_text())["notes"] == {"ceilings": "skipped: 1e-09 s are over"}


def test_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArdiffError, match="PyTorch sees no GPU"):
        run(GpuCheckConfig(device="cuda", output=str(tmp_path)))


def test_impossible_settings() -> None:
    for changes in ({"seconds": 0.0}, {"peak_tflops": -1.0}, {"checks": ()}):
        with pytest.raises(ValueError, match="must"):
            GpuCheckConfig(**changes)  # type: ignore[arg-type]
