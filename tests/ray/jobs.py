"""Starts jobs as a user does, each in a process of its own, and checks that they leave no process behind."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 800.0
"""Seconds after which a job counts as hanging. It is long because a busy machine is slow."""


def section(name: str, values: Mapping[str, object]) -> list[str]:
    """The values of a section of a configuration as overrides."""
    return [f"{name}.{key}={value}" for key, value in values.items()]


@dataclass(frozen=True)
class Result:
    """The exit code and the output of a job."""

    code: int
    out: str
    err: str

    def expect(self, code: int) -> str:
        """Asserts the exit code. Returns the error output."""
        assert self.code == code, self.out + self.err
        return self.err

    @property
    def complaint(self) -> str:
        """The line that says why the job failed. Asserts that it is the last line, the only one, and no traceback."""
        lines = [line for line in self.err.splitlines() if line.startswith("ardiff: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        assert self.err.rstrip().endswith(lines[0])
        return lines[0]


class Jobs:
    """Starts jobs. Their processes all inherit ``RAY_TMPDIR``, by which they are found."""

    def __init__(self) -> None:
        self.ray_folder = tempfile.mkdtemp(prefix="rt-", dir="/tmp")  # sockets inside need a short path
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.environment |= {"RAY_TMPDIR": self.ray_folder, "RAY_USAGE_STATS_ENABLED": "0"}
        self.started: list[subprocess.Popen[str]] = []

    def start(self, module: str, *arguments: str, log: Path | None = None) -> subprocess.Popen[str]:
        """``python -m ray_jobs.<module> arguments`` in a process group of its own. Its output goes to ``log``."""
        stream = subprocess.PIPE if log is None else log.open("w")
        process = subprocess.Popen(
            [sys.executable, "-m", f"ray_jobs.{module}", *arguments],
            cwd=ROOT,
            env=self.environment,
            stdout=stream,
            stderr=stream,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, module: str, *arguments: str, timeout: float = PATIENCE) -> Result:
        """Runs a job to its end."""
        process = self.start(module, *arguments)
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            self.kill(process)
            raise
        return Result(process.returncode, out, err)

    def kill(self, process: "subprocess.Popen[str]") -> Result:
        """SIGKILL to the job's whole process group."""
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate(timeout=PATIENCE)
        return Result(process.returncode, out, err)

    def alive(self) -> list[psutil.Process]:
        """The processes of all jobs started here."""
        return processes_of(self.ray_folder)

    def left_over(self, patience: float = 120.0) -> list[str]:
        """The processes still alive after ``patience`` seconds; empty as soon as all have ended."""
        deadline = time.monotonic() + patience
        while (left := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [f"{p.pid} {p.name()}" for p in left]

    def close(self) -> None:
        """Kills the remaining processes by their ids, removes Ray's files, and asserts that nothing had remained."""
        for started in self.started:
            if started.poll() is None:  # the test that waited for it has failed
                self.kill(started)
        left = self.left_over()
        for process in self.alive():
            with contextlib.suppress(psutil.Error):
                process.kill()
        shutil.rmtree(self.ray_folder, ignore_errors=True)
        assert not left, f"processes left behind: {left}"


def processes_of(ray_folder: str) -> list[psutil.Process]:
    """The processes, other than this one, whose Ray files are in ``ray_folder``."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # the process may end meanwhile
            belongs = process.environ().get("RAY_TMPDIR") == ray_folder and process.pid != os.getpid()
            if belongs and process.status() != psutil.STATUS_ZOMBIE:
                process.name()  # psutil caches the name
                processes.append(process)
    return processes
