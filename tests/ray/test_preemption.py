"""A preempted run loses no step: it stores a checkpoint at the next step's end and ends with the same bits."""

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import Cluster
from jobs import PATIENCE
from resuming import assert_equal_checkpoints, assert_equal_files, wait_for_checkpoint, wait_for_line
from test_cluster_training import settings, train_workers

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS, SECONDS = 40, 300
"""Steps of a run, and the time that a node has until its end: more than a step takes on a busy machine."""
CPUS = 3
"""Of each node: room for one worker with two threads, and for loading data."""


def run_settings(latents: Path, engine: str) -> list[str]:
    """No failure is allowed, because preemptions are none."""
    return [*settings(latents, engine), f"train.num_steps={STEPS}", "train.cpu_threads=2", "train.max_failures=0"]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A head and a node with one worker each. A test that loses the last node adds another one."""
    cluster = Cluster(head_cpus=CPUS, OMP_WAIT_POLICY="passive")
    cluster.environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = str(SECONDS)
    cluster.add_node(CPUS)
    yield cluster
    cluster.close()


@pytest.fixture(scope="module", params=["torch", "zero2"])
def whole(
    request: pytest.FixtureRequest, nodes: Cluster, latents: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of an undisturbed run, named after its engine."""
    folder = tmp_path_factory.mktemp("whole") / str(request.param)
    nodes.run("train_dit", "--output", str(folder), *run_settings(latents, folder.name)).expect(0)
    return folder


@pytest.mark.parametrize("notice", ["drain", "SIGTERM to the node", "SIGTERM to a worker"])
def test_preemption_costs_no_step(nodes: Cluster, latents: Path, tmp_path: Path, whole: Path, notice: str) -> None:
    broken, log, node = tmp_path / "broken", tmp_path / "log", nodes.nodes[-1]
    process = nodes.start("train_dit", "--output", str(broken), *run_settings(latents, whole.name), log=log)
    wait_for_checkpoint(broken, process)
    match notice:
        case "drain":
            nodes.drain_node(node, SECONDS)
        case "SIGTERM to the node":
            node.send_signal(signal.SIGTERM)
        case "SIGTERM to a worker":
            train_workers(nodes.ray_folder)[-1].send_signal(signal.SIGTERM)
    wait_for_line(log, r"Preemption: .*; the attempt ends after step")
    if notice != "SIGTERM to a worker":
        nodes.kill_node(node)
        nodes.add_node(CPUS)
    assert process.wait(PATIENCE) == 0, log.read_text()

    # The next attempt starts at the step that the preempted one had reached.
    lines, reason = log.read_text(), "received SIGTERM" if notice == "SIGTERM to a worker" else "on a drained node"
    [reached] = re.findall(rf"Preemption: worker \d {reason}; the attempt ends after step (\d+)", lines)
    assert re.findall(r"resuming from the checkpoint of step (\d+)", lines) == [reached]
    assert int(reached) < STEPS
    assert "An attempt failed" not in lines
    assert_equal_checkpoints(whole, broken)
    assert_equal_files(whole / "pipeline" / "dit.safetensors", broken / "pipeline" / "dit.safetensors")
