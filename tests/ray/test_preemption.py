"""A preempted run loses no step: it stores a checkpoint at the next step's end and ends with the same bits."""

import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from clusters import Cluster
from jobs import PATIENCE, Result
from resuming import assert_equal_checkpoints, assert_equal_files, wait_for_checkpoint, wait_for_line
from test_cluster_training import kill_a_worker, settings

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Command = Callable[..., Result]
STEPS, SECONDS = 40, 300
"""Steps of a run, and the time that a node has until its end: more than a step takes on a busy machine."""
RUN = [f"train.num_steps={STEPS}", "train.max_failures=0"]
"""No failure is allowed, because preemptions are none."""
CPUS = 3
"""Of each node: room for one worker with two threads, and for loading data."""


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    drain = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(SECONDS)}
    cluster = Cluster(head_cpus=CPUS, OMP_WAIT_POLICY="passive", **drain)
    cluster.add_node(CPUS)
    yield cluster
    cluster.close()


@pytest.mark.parametrize("engine", ["torch", "zero2"])
@pytest.mark.parametrize("notice", ["drain", "SIGTERM"])
def test_a_drained_node_costs_no_step(nodes: Cluster, latents: Path, tmp_path: Path, engine: str, notice: str) -> None:
    """Ray drains one of two nodes, by its own call or because the node's process receives SIGTERM."""
    whole, broken, log = tmp_path / "whole", tmp_path / "broken", tmp_path / "log"
    run = [*settings(latents, engine), *RUN, "train.cpu_threads=2"]
    nodes.run("train_dit", "--output", str(whole), *run).expect(0)
    process = nodes.start("train_dit", "--output", str(broken), *run, log=log)
    wait_for_checkpoint(broken, process)
    if notice == "drain":
        nodes.drain_node(nodes.nodes[1], seconds=SECONDS)
    else:
        nodes.nodes[1].send_signal(signal.SIGTERM)
    wait_for_line(log, r"Preemption: worker \d on a drained node;")
    nodes.add_node(CPUS)
    assert process.wait(PATIENCE) == 0, log.read_text()
    check(whole, broken, log.read_text(), "on a drained node")


@pytest.mark.parametrize("engine", ["torch", "zero2"])
def test_sigterm_to_a_worker_costs_no_step(
    ardiff: Command, cluster: None, latents: Path, tmp_path: Path, engine: str
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run = [*settings(latents, engine), *RUN]
    ardiff("train-dit", "--output", whole, *run).expect(0)
    with ThreadPoolExecutor(1) as pool:
        terminate = pool.submit(kill_a_worker, broken, signal.SIGTERM)
        log = ardiff("train-dit", "--output", broken, *run).expect(0)
        terminate.result()
    check(whole, broken, log, "received SIGTERM")


def check(whole: Path, broken: Path, log: str, reason: str) -> None:
    """The run went on at the step that it had reached, and ended with the bits of the undisturbed one."""
    [reached] = re.findall(rf"Preemption: worker \d {reason}; the attempt ends after step (\d+)", log)
    assert re.findall(r"resuming from the checkpoint of step (\d+)", log) == [reached], log
    assert "An attempt failed" not in log
    assert int(reached) < STEPS
    assert_equal_checkpoints(whole, broken)
    assert_equal_files(whole / "pipeline" / "dit.safetensors", broken / "pipeline" / "dit.safetensors")
