"""The HTTP service on Ray Serve: streaming, a killed replica, autoscaling, draining."""

import contextlib
import hashlib
import io
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import psutil
import pytest
from jobs import PATIENCE, ROOT
from PIL import Image
from ports import free_ports

from ardiff.client import Client, ServiceError
from ardiff.pipeline import ARDiffusionPipeline

pytestmark = pytest.mark.ray
LONG = {"num_frames": 1000, "num_inference_steps": 50, "ar_step": 10}
JOB = {"num_frames": 60, "num_inference_steps": 40, "ar_step": 8, "seed": 5, "class_label": 1}
QUICK = ["poll_seconds=0.1", "heartbeat_seconds=0.5", "lease_seconds=10", "segment_seconds=0.3", "drain_seconds=300"]


class Server:
    """``ardiff serve`` in a process of its own."""

    def __init__(self, jobs: Any, folder: Path, pipeline: ARDiffusionPipeline, *arguments: str) -> None:
        pipeline.save_pretrained(str(folder / "pipeline"))
        self.jobs, self.pipeline, self.storage = jobs, pipeline, folder / "shared"
        port = free_ports()
        settings = [f"service.{setting}" for setting in (f"storage={self.storage}", *QUICK)]
        options = ["--checkpoint", str(folder / "pipeline"), "--port", str(port), "--cpu-threads", "1"]
        self.process = jobs.start("serve", *options, *settings, *arguments)
        self.url = f"http://127.0.0.1:{port}"
        self.client = Client(self.url)
        deadline = time.monotonic() + PATIENCE
        while not self._ready():
            if self.process.poll() is not None:
                raise AssertionError(self.process.communicate()[1])
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/healthz", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def replicas(self) -> list[psutil.Process]:
        """The processes of the replicas."""
        found = []
        for process in self.jobs.alive():
            try:
                if "ServeReplica" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def wait_for(self, video_id: str, seen: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Waits until ``seen(record)``."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                if seen(video := self.client.get(video_id)):
                    return video
            except ServiceError:  # while no replica is there
                video = {}
            assert time.monotonic() < deadline, video
            time.sleep(0.05)

    def serve_client(self, name: str) -> None:
        """Runs the calls of a client that others wrote, ``tests/clients/NAME_calls.py``, in its own environment."""
        python, folder = ROOT / ".venv-clients" / "bin" / "python", self.storage.parent
        assert python.exists(), "run `make sdk-clients`"
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / "picture.png")
        script = ROOT / "tests" / "clients" / f"{name}_calls.py"
        arguments = [python, script, self.url, folder / "picture.png", folder]
        result = subprocess.run(arguments, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert result.returncode == 0, result.stderr

    def run_sdk_example(self) -> None:
        """Runs the example of the OpenAI SDK, in the environment of such clients."""
        script, video = ROOT / "examples" / "use_the_openai_sdk.py", self.storage.parent / "example.mp4"
        command = [ROOT / ".venv-clients" / "bin" / "python", script, self.url, video]
        result = subprocess.run([*command, "--prompt", "ring", "--seconds", "1"], capture_output=True, text=True)
        assert (result.returncode, result.stdout.count("completed, 1 s")) == (0, 1), result.stderr
        assert video.read_bytes()[4:8] == b"ftyp"
        result = subprocess.run([*command, "--prompt", "cube"], capture_output=True, text=True)
        assert result.returncode == 1
        assert result.stderr.startswith("Error code: 422 - There is no class 'cube'"), result.stderr

    def stop(self) -> tuple[int, str]:
        """Presses Ctrl-C. Returns the exit code and the error output."""
        self.process.send_signal(signal.SIGINT)
        try:
            err = self.process.communicate(timeout=PATIENCE)[1]
        except subprocess.TimeoutExpired:
            self.jobs.kill(self.process)
            raise
        return self.process.returncode, err


@pytest.fixture
def start(
    jobs: Any, make_pipeline: Callable[..., ARDiffusionPipeline], tmp_path: Path
) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def begin(*arguments: str) -> Server:
        servers.append(Server(jobs, tmp_path, make_pipeline(), *arguments))
        return servers[-1]

    yield begin
    for server in servers:
        if server.process.poll() is None:
            jobs.kill(server.process)
        for process in jobs.alive():
            with contextlib.suppress(psutil.Error):
                process.kill()


def test_a_service_streams_survives_the_death_of_its_replica_and_drains(start: Callable[..., Server]) -> None:
    server = start()
    client = server.client
    assert [m["id"] for m in client.models()] == ["default"]

    # The frames are the pipeline's.
    done = client.wait(client.create(**JOB)["id"], seconds=0.05)
    expected = server.pipeline(**JOB).frames[0]
    assert done["frames_sha256"] == hashlib.sha256(expected.numpy().tobytes()).hexdigest()

    client.delete(done["id"])
    server.serve_client("openai")
    server.run_sdk_example()

    # Frames are sent while later ones are generated. A client that leaves cancels its video.
    with httpx.stream("POST", f"{server.url}/v1/videos:stream", json=LONG, timeout=PATIENCE) as answer:
        parts = answer.iter_raw()
        assert b"moov" in next(parts)
        left = answer.headers["x-video-id"]
        assert client.get(left)["status"] == "in_progress"
    cancelled = server.wait_for(left, lambda video: video["status"] == "cancelled")
    assert cancelled["frames_done"] < 1000

    # A replica is killed while it runs a stream and a job that has just changed. The next one continues both.
    longer = {**JOB, "num_frames": 300}
    job, parts = client.create(**longer), client.stream(**longer)
    received = [next(parts)]
    (stream,) = client.videos(limit=1)
    for video in (job, stream):
        server.wait_for(video["id"], lambda state: state["frames_done"] > 0)
    (replica,) = server.replicas()
    change = client.change(job["id"], class_label="square")
    replica.kill()
    assert change["status"] == "applied"
    received += parts
    with av.open(io.BytesIO(b"".join(received))) as container:
        assert sum(1 for _ in container.decode(video=0)) == 300
    for video, conditions in ((job, [(change["from_frame"], {"class_label": 2})]), (stream, [])):
        done = server.wait_for(video["id"], lambda state: state["status"] == "completed")
        expected = server.pipeline(**longer, conditions=conditions).frames[0]
        assert done["frames_sha256"] == hashlib.sha256(expected.numpy().tobytes()).hexdigest()

    # Ctrl-C stops the service once its running job is done.
    last = client.create(**JOB, guidance_scale=2.0)
    server.wait_for(last["id"], lambda video: video["status"] != "queued")
    code, err = server.stop()
    assert code == 0, err
    assert "Traceback" not in err
    with contextlib.closing(sqlite3.connect(server.storage / "jobs.sqlite")) as database:
        assert database.execute("SELECT status FROM jobs WHERE id = ?", [last["id"]]).fetchall() == [("completed",)]
    assert server.jobs.left_over() == []


@pytest.mark.slow
def test_replicas_follow_the_queue_and_fifty_clients_are_answered_once(start: Callable[..., Server]) -> None:
    scaling = ["--max-replicas", "3", "--jobs-per-replica", "3", "--upscale-delay-s", "1", "--downscale-delay-s", "5"]
    server = start(*scaling, "service.max_waiting=16", "service.engine.max_requests=4")
    assert len(server.replicas()) == 1
    server.serve_client("litellm")
    for video in server.client.videos():
        server.client.delete(video["id"])
    answers: list[httpx.Response] = []

    def ask(seed: int) -> None:
        body = {"seed": seed, "num_frames": 400, "num_inference_steps": 40, "ar_step": 8}
        answers.append(httpx.post(f"{server.url}/v1/videos", json=body, timeout=PATIENCE))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    accepted = [a.json()["id"] for a in answers if a.status_code == 202]
    refused = [a for a in answers if a.status_code in (429, 503)]
    assert len(accepted) + len(refused) == 50
    assert len(accepted) >= 16
    assert all(int(a.headers["retry-after"]) >= 1 for a in refused)
    most, deadline = 1, time.monotonic() + PATIENCE
    waiting = set(accepted)
    while waiting:
        assert time.monotonic() < deadline
        most = max(most, len(server.replicas()))
        waiting -= {video_id for video_id in waiting if server.client.get(video_id)["status"] == "completed"}
        if most == 1 and len(waiting) < 12:  # kept full until there is a second replica
            ask(len(answers))
            if answers[-1].status_code == 202:
                accepted.append(answers[-1].json()["id"])
                waiting.add(accepted[-1])
        time.sleep(0.5)
    assert most > 1
    listed = server.client.videos(limit=100)
    assert sorted(video["id"] for video in listed) == sorted(accepted)
    assert len({video["seed"] for video in listed}) == len(accepted)
    while len(server.replicas()) > 1:
        assert time.monotonic() < deadline + PATIENCE
        time.sleep(0.5)
    assert server.stop()[0] == 0
