"""The head of a cluster whose state is in Redis dies and starts again while a submitted job trains."""

import shlex
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from clusters import Cluster
from jobs import ROOT
from redis_server import RedisServer
from resuming import assert_equal_checkpoints
from test_cluster_training import settings

from ray_jobs.runtime.job_client import Submission, connection, run, runtime_env

pytestmark = [pytest.mark.ray, pytest.mark.slow]
NODE = "127.0.0.3"
"""The address of the only node with CPUs."""
# Of several nodes on one machine a driver joins the head, which it does not on machines of their own.
ENTRYPOINT = f"import sys, torch, ray; ray.init(_node_ip_address='{NODE}')"
ENTRYPOINT += "; from ardiff.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, and a node for two workers and the driver."""
    with RedisServer() as redis:
        state = {
            "RAY_REDIS_ADDRESS": f"127.0.0.1:{redis.port}",
            "RAY_external_storage_namespace": "ardiff",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "600",  # Ray's 60 seconds are for machines that do nothing else
        }
        cluster = Cluster(head_cpus=0, redis_password=redis.password, OMP_WAIT_POLICY="passive", **state)
        try:
            cluster.add_node(cpus=6)
            yield cluster
        finally:
            cluster.close()


def train(cluster: Cluster, latents: Path, output: Path) -> int:
    """Submits a training job whose driver reserves a CPU, and follows it. Returns its exit code."""
    arguments = ["train-dit", "--output", str(output), *settings(latents, "torch"), "train.max_failures=0"]
    entrypoint = shlex.join(["python", "-c", ENTRYPOINT, *arguments])
    submission = Submission(output.name, entrypoint, runtime_env(ROOT, []), {}, driver_cpus=1)
    with connection(f"http://{cluster.dashboard}", cluster.environment["RAY_AUTH_TOKEN_PATH"]) as client:
        return run(client, submission)


def test_training_outlives_the_head(
    cluster: Cluster, latents: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(train, cluster, latents, broken)
        while not (broken / "ray" / "checkpoint_manager_snapshot.json").exists():
            assert not job.done(), job.result()
            time.sleep(0.1)
        cluster.restart_head()
        assert job.result() == 0
    assert "resuming" not in capfd.readouterr().out
    assert train(cluster, latents, whole) == 0
    assert_equal_checkpoints(whole, broken)
