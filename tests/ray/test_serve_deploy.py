"""``serve deploy`` of the shipped configuration on a real cluster with other values, then a rolling update."""

import contextlib
import hashlib
import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from clusters import Cluster
from jobs import ROOT
from ports import free_ports
from prometheus_client.parser import text_string_to_metric_families
from prometheus_names import exported

from ardiff.client import Client
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.serving.keys import digest
from ardiff.serving.metrics import MEASURES

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]
PATIENCE = 600.0
KEY = "a-key-of-this-test"
JOB = {"num_frames": 20, "num_inference_steps": 10, "ar_step": 2, "seed": 5, "class_label": 1}
LONG = {"num_frames": 1000, "num_inference_steps": 50, "ar_step": 10}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(head_cpus=4, ARDIFF_LOG="json")
    try:
        yield cluster
    finally:
        cluster.close()


def with_values(**values: Any) -> str:
    """The shipped configuration with other values in its section of values."""
    text = (ROOT / "cluster" / "overlays" / "aws" / "serve_config.yaml").read_text()
    head, separator, rest = text.partition("\nproxy_location:")
    for name, value in values.items():
        # A value in braces or on the line; `models` may go on with deeper lines.
        head, count = re.subn(rf"(?m)^(  [\w-]+: &{name})\b.*(\n    .*)*$", rf"\1 {json.dumps(value)}", head)
        assert count == 1, name
    return head + separator + rest


class Endpoint:
    """The application, deployed on the cluster with Ray's command line."""

    def __init__(self, cluster: Cluster, folder: Path, **values: Any) -> None:
        self.cluster, self.folder, self.values = cluster, folder, {"host": "127.0.0.1", "port": free_ports(), **values}
        self.url = f"http://127.0.0.1:{self.values['port']}"
        self.client = Client(self.url, KEY)

    def serve(self, *arguments: str) -> None:
        """Runs Ray's ``serve`` command."""
        command = [str(Path(sys.executable).with_name("serve")), *arguments, "-a", f"http://{self.cluster.dashboard}"]
        done = subprocess.run(
            command, env=self.cluster.environment, cwd=self.folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def deploy(self, **values: Any) -> None:
        self.values |= values
        (self.folder / "serve.yaml").write_text(with_values(**self.values))
        self.serve("deploy", "serve.yaml")

    def wait_until_running(self) -> None:
        token = Path(self.cluster.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(
            f"http://{self.cluster.dashboard}/api/serve/applications/", headers={"Authorization": f"Bearer {token}"}
        )
        deadline = time.monotonic() + PATIENCE
        while True:
            with urllib.request.urlopen(request, timeout=60) as answer:
                application = json.load(answer)["applications"].get("ardiff", {})
            if application.get("status") == "RUNNING":
                return
            assert application.get("status") != "DEPLOY_FAILED", application["message"]
            assert time.monotonic() < deadline, application
            time.sleep(0.5)

    def wait(self, video_id: str, seen: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while not seen(video := self.client.get(video_id)):
            assert time.monotonic() < deadline, video
            time.sleep(0.05)
        return video


def names_at(url: str, **headers: str) -> set[str]:
    """The names of the samples that Prometheus would collect."""
    answer = httpx.get(url, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    return {sample.name for family in text_string_to_metric_families(answer.text) for sample in family.samples}


def sha256(pipeline: ARDiffusionPipeline, **fields: Any) -> str:
    return hashlib.sha256(pipeline(**fields).frames[0].numpy().tobytes()).hexdigest()


def test_deploy_serve_update_and_scrape(
    cluster: Cluster, make_pipeline: Callable[..., ARDiffusionPipeline], tmp_path: Path
) -> None:
    first, second = make_pipeline(), make_pipeline(seed=7)
    first.save_pretrained(str(tmp_path / "first"))
    second.save_pretrained(str(tmp_path / "second"))
    (tmp_path / "keys.yaml").write_text(f"alice: {{sha256: {digest(KEY)}}}\n")
    endpoint = Endpoint(
        cluster,
        tmp_path,
        models={"first": str(tmp_path / "first")},
        storage=str(tmp_path / "shared"),
        database=None,
        password=None,
        keys=str(tmp_path / "keys.yaml"),
        device="cpu",
        precision="fp32",
        gpus=0,
        cpus=1,
        most=2,
        drain=30,
    )
    endpoint.deploy()
    endpoint.wait_until_running()
    client = endpoint.client
    done = client.wait(client.create(**JOB)["id"], seconds=0.1)
    assert done["frames_sha256"] == sha256(first, **JOB)
    assert b"ftyp" in httpx.get(
        f"{endpoint.url}/v1/videos/{done['id']}/content", headers={"Authorization": f"Bearer {KEY}"}, timeout=60
    ).content[:64]  # fmt: skip
    assert httpx.post(f"{endpoint.url}/v1/videos", json=JOB, timeout=60).status_code == 401

    # Prometheus finds all metrics at the replica, and later at Ray's exporter of the node.
    own = names_at(f"{endpoint.url}/metrics", Authorization=f"Bearer {KEY}")
    wanted = set().union(*(exported(measure) for measure in MEASURES))
    assert {name.removeprefix("ray_") for name in wanted} <= own
    deadline = time.monotonic() + 180
    while missing := wanted - names_at(f"http://127.0.0.2:{cluster.metrics_ports[0]}/metrics"):
        assert time.monotonic() < deadline, missing
        time.sleep(2)

    # A second model is deployed while a client streams a video. The stream may end after 30 seconds; jobs move on.
    ended: list[float] = []
    started = threading.Event()

    def watch() -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        with (
            contextlib.suppress(httpx.HTTPError),
            httpx.stream("POST", f"{endpoint.url}/v1/videos:stream", json=LONG, headers=headers, timeout=300) as answer,
        ):
            for _ in answer.iter_raw():
                started.set()
        ended.append(time.monotonic())

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert started.wait(120)
    endpoint.deploy(models={"first": str(tmp_path / "first"), "second": str(tmp_path / "second")})
    deadline = time.monotonic() + PATIENCE
    while {model["id"] for model in client.models()} != {"first", "second"}:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    done = endpoint.wait(client.create(model="second", **JOB)["id"], lambda video: video["status"] == "completed")
    assert done["frames_sha256"] == sha256(second, **JOB)
    watcher.join(PATIENCE)
    assert ended
    endpoint.wait_until_running()
    said = [
        json.loads(line)
        for file in Path(cluster.ray_folder).glob("ray/session_2*/logs/**/*")
        if file.is_file()
        for line in file.read_text(errors="replace").splitlines()
        if line.startswith("{") and '"Draining: ' in line
    ]
    assert [(line["job"], line["run"]) for line in said] == [("serve", "ardiff")], said
    assert said[0]["replica"]

    # `ardiff serve` on the same cluster does not end the deployed application.
    tried = cluster.run("serve", "--checkpoint", str(tmp_path / "first"))
    assert tried.code == 2, tried.err
    assert "The cluster already serves ardiff" in tried.err
    assert {model["id"] for model in client.models()} == {"first", "second"}
    endpoint.serve("shutdown", "-y")
