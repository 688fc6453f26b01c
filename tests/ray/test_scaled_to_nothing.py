"""Jobs on a cluster without workers: they demand nodes from the autoscaler and wait for them."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import Cluster
from jobs import PATIENCE, ROOT
from test_submit import SET, Laptop

pytestmark = [pytest.mark.ray, pytest.mark.slow]
DEVICE = """
from ray_jobs.runtime.cluster import ray_cluster, resolve_device
with ray_cluster():
    print(resolve_device("auto").type, resolve_device("cuda").type, flush=True)
"""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, as in cluster/base/raycluster.yaml."""
    cluster = Cluster(head_cpus=0)
    try:
        yield cluster
    finally:
        cluster.close()


def ray_status(cluster: Cluster) -> str:
    """The output of ``ray status``, which lists the resources that jobs demand from the autoscaler."""
    status = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", cluster.address],
        env=cluster.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return status.stdout + status.stderr


def wait_for(cluster: Cluster, text: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while text not in (status := ray_status(cluster)):
        assert time.monotonic() < deadline, status
        time.sleep(1)


def test_jobs_wait_for_the_nodes_that_they_ask_for(cluster: Cluster, tmp_path: Path) -> None:
    laptop = Laptop(cluster)
    process = laptop.start("submit", "prepare", f"output={tmp_path}/set", *SET)
    try:
        wait_for(cluster, "{'CPU': 1.0}")
        cluster.add_node(cpus=3)
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 0, out + err
    assert "Waiting for nodes with 1 CPUs; the cluster has 0." in out
    assert json.loads((tmp_path / "set" / "stage.json").read_text())["name"] == "prepare"

    process = subprocess.Popen(
        [sys.executable, "-c", DEVICE], env=cluster.environment, cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_for(cluster, "{'GPU': 1.0}")
        cluster.add_node(cpus=1, gpus=1)
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert out == "cpu cuda\n", err
    assert "device=auto: the cluster has no GPU now, so the job runs on CPUs." in err
