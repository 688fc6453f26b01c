"""Elastic training on a cluster whose nodes come and go."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import Cluster
from resuming import wait_for_checkpoint, wait_for_line
from test_cluster_training import settings

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(head_cpus=3)
    yield cluster
    cluster.close()


def test_workers_come_and_go_with_nodes(cluster: Cluster, latents: Path, tmp_path: Path) -> None:
    """Each node has room for one worker: training starts on one, adds a second, and continues when a node is killed."""
    log, output = tmp_path / "log", tmp_path / "run"
    sizes = ["train.num_steps=1000000", "train.checkpoint_every=100"]
    elastic = ["train.min_workers=1", "train.resize_interval=1", "train.cpu_threads=2", "train.max_failures=5"]
    process = cluster.start(
        "train_dit", "--output", str(output), *settings(latents, "torch"), *sizes, *elastic, log=log
    )
    wait_for_line(log, "1 of 2 workers")
    wait_for_checkpoint(output, process)
    node = cluster.add_node(cpus=3)
    wait_for_line(log, r"resuming from the checkpoint of step \d+ with 2 of 2 workers")
    reached = wait_for_checkpoint(output, process)
    while wait_for_checkpoint(output, process) == reached:
        time.sleep(0.2)
    cluster.kill_node(node)
    wait_for_line(log, r"with 2 of 2 workers[\s\S]*with 1 of 2 workers")
    reached = wait_for_checkpoint(output, process)
    while (now := wait_for_checkpoint(output, process)) <= reached + 100:
        time.sleep(0.2)
    cluster.kill(process)
    losses = json.loads((output / "history.json").read_text())["loss"]
    assert [step for step, _ in losses][: now // 10] == list(range(10, now + 1, 10))
