"""A preempted run loses no step: it stores a checkpoint at the next step's end and ends with the same bits."""

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clusters import Cluster
from jobs import PATIENCE, Result
from resuming import assert_equal_checkpoints, assert_equal_files, wait_for_checkpoint, wait_for_line
from test_cluster_training import STEPS, settings

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Command = Callable[..., Result]
# One worker and the loading of data for each node.
CPUS, WORKER = 3, ["train.cpu_threads=2"]


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    cluster = Cluster(head_cpus=CPUS)
    cluster.add_node(CPUS)
    yield cluster
    cluster.close()


@pytest.mark.parametrize("engine", ["torch", "zero2"])
@pytest.mark.parametrize("notice", ["drain", "SIGTERM"])
def test_a_drained_node_costs_no_step(
    ardiff: Command, cluster: None, nodes: Cluster, latents: Path, tmp_path: Path, engine: str, notice: str
) -> None:
    """Ray drains one of two nodes, by its own call or because the node's process receives SIGTERM."""
    whole, broken, log = tmp_path / "whole", tmp_path / "broken", tmp_path / "log"
    whole_settings = [*settings(latents, engine), "train.max_failures=0"]
    ardiff("train-dit", "--output", whole, *whole_settings).expect(0)
    process = nodes.start("train_dit", "--output", str(broken), *whole_settings, *WORKER, log=log)
    wait_for_checkpoint(broken, process)
    if notice == "drain":
        nodes.drain_node(nodes.nodes[1], seconds=15)
    else:
        nodes.nodes[1].send_signal(signal.SIGTERM)
    wait_for_line(log, r"Preemption: worker \d on a drained node;")
    nodes.add_node(CPUS)
    assert process.wait(PATIENCE) == 0, log.read_text()
    check(whole, broken, log.read_text(), "on a drained node")


def check(whole: Path, broken: Path, log: str, reason: str) -> None:
    """The run went on at the step that it had reached, and ended with the bits of the undisturbed one."""
    [reached] = re.findall(rf"Preemption: worker \d {reason}; the attempt ends after step (\d+)", log)
    assert re.findall(r"resuming from the checkpoint of step (\d+)", log) == [reached], log
    assert "An attempt failed" not in log
    assert int(reached) < STEPS
    assert_equal_checkpoints(whole, broken)
    assert_equal_files(whole / "pipeline" / "dit.safetensors", broken / "pipeline" / "dit.safetensors")
