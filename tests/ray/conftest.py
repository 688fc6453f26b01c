"""Every test starts the jobs as a user would, each with Ray's files in a folder of its own, and leaves no process."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch

from ardiff.data.config import SyntheticConfig
from ardiff.data.latents import LatentSet, LatentStatistics, latent_table, write_description
from ardiff.data.manifest import write_manifest
from ardiff.data.synthetic import write_video
from ardiff.pretrained import save_autoencoder
from ardiff.vae import ARAutoencoder, AutoencoderConfig
from ray_jobs.runtime.cluster import ray_cluster

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 800.0
"""Seconds after which something hangs. What is slow on a busy machine is not wrong."""
# A shell that runs the tests in the background has them ignore it, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Result:
    """What a job said."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def complaint(self) -> str:
        """The one line that says why the job failed; asserts that it is the only one, and no traceback is beside it."""
        lines = [line for line in self.err.splitlines() if line.startswith("ardiff: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        assert self.err.rstrip().endswith(lines[0])
        return lines[0]


class Jobs:
    """Starts jobs. Their processes are known by ``RAY_TMPDIR`` in their environment, which they all inherit."""

    def __init__(self) -> None:
        self.ray_folder = tempfile.mkdtemp(prefix="rt-", dir="/tmp")  # sockets inside need a short path
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.environment |= {"RAY_TMPDIR": self.ray_folder, "RAY_USAGE_STATS_ENABLED": "0"}
        self.started: list[subprocess.Popen[str]] = []

    def start(self, module: str, *arguments: str, log: Path | None = None) -> subprocess.Popen[str]:
        """``python -m ray_jobs.<module> arguments`` in a process group of its own. What it says goes to ``log``."""
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
        started, process = time.monotonic(), self.start(module, *arguments)
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            self.kill(process)
            raise
        return Result(process.returncode, out, err, time.monotonic() - started)

    def kill(self, process: "subprocess.Popen[str]") -> Result:
        """SIGKILL to the job's whole process group."""
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate(timeout=PATIENCE)
        return Result(process.returncode, out, err, 0.0)

    def alive(self) -> list[psutil.Process]:
        """Processes of all jobs started here."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # it ends while it is looked at
                started_here = process.environ().get("RAY_TMPDIR") == self.ray_folder and process.pid != os.getpid()
                if started_here and process.status() != psutil.STATUS_ZOMBIE:
                    process.name()  # which psutil keeps
                    found.append(process)
        return found

    def left_over(self, patience: float = 120.0) -> list[str]:
        """What is still alive after ``patience`` seconds; empty as soon as all is gone."""
        deadline = time.monotonic() + patience
        while (left := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [f"{p.pid} {p.name()}" for p in left]

    def close(self) -> None:
        """Ends what is left, by process id, and removes Ray's files."""
        for started in self.started:
            if started.poll() is None:  # the test that waited for it has failed
                self.kill(started)
        left = self.left_over()
        for process in self.alive():
            with contextlib.suppress(psutil.Error):
                process.kill()
        shutil.rmtree(self.ray_folder, ignore_errors=True)
        assert not left, f"processes left behind: {left}"


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    jobs = Jobs()
    yield jobs
    jobs.close()


@contextlib.contextmanager
def ray_session() -> Iterator[None]:
    """A Ray session in this process, with its files in a folder of its own."""
    before, folder = dict(os.environ), tempfile.mkdtemp(prefix="rt-", dir="/tmp")
    os.environ["RAY_TMPDIR"] = folder
    try:
        with ray_cluster():
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray session for all tests of a module that run jobs in this process."""
    with ray_session():
        yield


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 5 files with 60 clips each, and the AR-VAE that could have made them."""
    folder = tmp_path_factory.mktemp("latents")
    torch.manual_seed(0)
    sizes = AutoencoderConfig(resolution=16, patch_size=8, num_tokens=2, token_dim=4, width=16, depth=1, num_heads=2)
    save_autoencoder(str(folder / "vae"), ARAutoencoder(sizes))
    generator = np.random.default_rng(0)
    files = [f"part-{i}.parquet" for i in range(5)]
    for file in files:
        columns = {"latents": generator.normal(size=(60, 8, 2, 4)), "label": np.arange(60) % 3}
        pq.write_table(latent_table(columns), folder / file)
    statistics = LatentStatistics([[0.0] * 4] * 2, 1.0)
    names = ["a", "b", "c"]
    description = LatentSet("fabricated", 8, 2, 4, names, files, [60] * 5, statistics, str(folder / "vae"))
    write_description(str(folder), description)
    return folder


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight videos of 12 frames."""
    folder = tmp_path_factory.mktemp("videos")
    config = SyntheticConfig(num_train=8, num_test=1, num_frames=12, num_long=0)
    write_manifest(str(folder / "manifest.parquet"), [write_video(config, str(folder), i, "train") for i in range(8)])
    return folder / "manifest.parquet"
