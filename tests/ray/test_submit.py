"""Jobs submitted from another machine to a cluster of two nodes that needs a token."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import Cluster
from jobs import PATIENCE, ROOT, Result

pytestmark = pytest.mark.ray

SET = ["synthetic.num_train=8", "synthetic.num_test=8", "synthetic.num_frames=8", "synthetic.num_long=0"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(head_cpus=3)
    try:
        cluster.add_node(cpus=3)
        yield cluster
    finally:
        cluster.close()


class Laptop:
    """Runs ``ardiff`` as on another machine. It knows only the dashboard's address and a token."""

    def __init__(self, cluster: Cluster, **environment: str) -> None:
        self.address = f"http://{cluster.dashboard}"
        self.token = cluster.environment["RAY_AUTH_TOKEN_PATH"]
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))}
        self.environment = {**kept, "RAY_TMPDIR": cluster.ray_folder, **environment}

    def start(self, *arguments: str, token: str | None = None) -> "subprocess.Popen[str]":
        command = [arguments[0], "--address", self.address, "--token-file", token or self.token, *arguments[1:]]
        return subprocess.Popen(
            [Path(sys.executable).with_name("ardiff"), *command],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, token: str | None = None, timeout: float = PATIENCE) -> Result:
        process = self.start(*arguments, token=token)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return Result(process.returncode, out, err)

    def submit_plainly(self, folder: Path, *job: str) -> Result:
        """``ray job submit --working-dir . -- python -m job`` in ``folder``."""
        done = subprocess.run(
            [Path(sys.executable).with_name("ray"), "job", "submit", "--working-dir", ".", "--", "python", "-m", *job],
            cwd=folder,
            env={
                **self.environment,
                "RAY_API_SERVER_ADDRESS": self.address,
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": self.token,
            },
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs on Ray's list."""
        token = Path(self.token).read_text()
        request = urllib.request.Request(f"{self.address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            found: list[dict[str, Any]] = json.load(answer)
        return found


def test_a_job_is_sent_followed_and_known_by_its_configuration(cluster: Cluster, tmp_path: Path) -> None:
    laptop, output = Laptop(cluster), tmp_path / "set"
    result = laptop.run("submit", "prepare", f"output={output}", *SET)
    assert result.code == 0, result.out + result.err
    assert (output / "manifest.parquet").exists()
    assert "16 videos" in result.out
    name = re.search(rf"{laptop.address}/#/jobs/(prepare-\S+)", result.err)
    assert name, result.err
    [job] = [job for job in laptop.jobs() if job["submission_id"] == name[1]]
    assert job["metadata"]["output"] == str(output)
    assert {"fingerprint", "commit"} <= job["metadata"].keys()


def test_a_wrong_token_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0" * 64)
    result = Laptop(cluster).run("submit", "prepare", f"output={tmp_path}", token=str(tmp_path / "token"))
    assert result.code == 1
    assert "needs a token, and the given one" in result.complaint


def test_a_failing_job_ends_with_its_code_and_reason(cluster: Cluster, tmp_path: Path) -> None:
    result = Laptop(cluster).run("submit", "encode", f"manifest={tmp_path}/none.parquet", f"output={tmp_path}/z")
    assert result.code == 1
    assert "none.parquet" in result.out
    assert "failed with exit code 1" in result.err
    assert "Traceback" not in result.out + result.err


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of this checkout's code and configurations, with folders for data and runs."""
    folder = tmp_path / "checkout"
    for name in ("ardiff", "ray_jobs", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".rayignore", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    for name in ("data/train/a.mp4", "runs/dit/model"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    synthetic = {"num_train": 4, "num_test": 4, "num_frames": 8, "num_long": 0}
    (folder / "configs" / "own.yaml").write_text(json.dumps({"synthetic": synthetic}))
    return folder


def test_rays_own_command_submits_a_checkout_without_its_data(cluster: Cluster, checkout: Path, tmp_path: Path) -> None:
    output = tmp_path / "set"
    job = ["ray_jobs.prepare", "--config", "configs/own.yaml", f"output={output}"]
    result = Laptop(cluster).submit_plainly(checkout, *job)
    assert result.code == 0, result.out + result.err
    assert "8 videos" in result.out
    assert (output / "manifest.parquet").exists()
    [sent] = [
        file.parents[1]
        for file in Path(cluster.ray_folder).glob(
            "ray/session_2*/runtime_resources/working_dir_files/*/configs/own.yaml"
        )
    ]
    assert {path.name for path in sent.iterdir()} - {".rayignore", ".gitignore"} == {"ardiff", "ray_jobs", "configs"}
    assert (sent / "ardiff" / "data" / "storage.py").exists()


def test_doctor_looks_at_every_node(cluster: Cluster, tmp_path: Path) -> None:
    result = Laptop(cluster).run("doctor", "--storage", str(tmp_path), "--megabytes", "8")
    assert result.code == 0, result.out + result.err
    assert re.search(r"ok +nodes +2: ", result.out)
    assert re.search(r"ok +versions .*ray 2\.", result.out)
    assert result.out.count("object store") == 2
    assert "every node writes, reads, lists and deletes" in result.out
    assert re.search(r"all-reduce +gloo, 2 workers on 2 nodes: 8 MiB in [\d.]+ ms, [\d.]+ GB/s", result.out)
    assert re.search(r"at most 0\.\d+ s apart", result.out)


@pytest.mark.slow
def test_doctor_says_what_to_fix(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = Laptop(cluster).run("doctor", "--storage", str(tmp_path / "file"), "--workers", "50", "--patience", "1")
    assert result.code == 1
    assert re.search(r"FIX +storage +.*127\.0\.0\.3", result.out)
    assert re.search(r"FIX +all-reduce +no resources for 50 workers", result.out)


@pytest.mark.slow
def test_ctrl_c_stops_the_job_and_says_how_to_resume(cluster: Cluster, latents: Path, tmp_path: Path) -> None:
    laptop = Laptop(cluster)
    sizes = {"num_frames": 8, "num_tokens": 2, "token_dim": 4, "width": 32, "depth": 2, "num_heads": 2}
    settings = [f"dit.{name}={value}" for name, value in sizes.items()]
    settings += [f"latents={latents}", f"output={tmp_path}", "train.num_steps=1000000", "train.cpu_threads=1"]
    process = laptop.start("submit", "train-dit", *settings)
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        name = process.stderr.readline().split(":")[0]
        while "step" not in process.stdout.readline():
            assert process.poll() is None
        again = laptop.run("submit", "train-dit", *settings)
        assert f"{name} is already writing to {tmp_path}" in again.complaint
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "The same command resumes." in err
    assert [job["status"] for job in laptop.jobs() if job["submission_id"] == name] == ["STOPPED"]
