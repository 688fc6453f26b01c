"""A preempted run loses no step: it stores a checkpoint at the next step's end and goes on with the same bits."""

import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import Cluster
from jobs import PATIENCE
from resuming import assert_equal_files, last_checkpoint, wait_for_checkpoint, wait_for_line
from test_cluster_training import settings, train_workers

from ardiff.train.shards import GROUPS

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SECONDS = 300
"""The time that a node has from the notice to its end: more than a step takes on a busy machine."""
CPUS = 3
"""Of each node: room for one worker with two threads, and for loading data."""
EVERY = 10
"""Steps between checkpoints."""
NOTICES = {"drain": "on a drained node", "SIGTERM to the node": "on a drained node", "SIGTERM to a worker": "SIGTERM"}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A head and a node with one worker each."""
    cluster = Cluster(head_cpus=CPUS, OMP_WAIT_POLICY="passive")
    cluster.environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = str(SECONDS)
    cluster.add_node(CPUS)
    yield cluster
    cluster.close()


@pytest.mark.parametrize("engine", ["torch", "zero2"])
def test_preemptions_cost_no_step(nodes: Cluster, latents: Path, tmp_path: Path, engine: str) -> None:
    """One run is preempted in three ways, one after the other. No failure is allowed, because preemptions are none."""
    whole, broken, log = tmp_path / "whole", tmp_path / "broken", tmp_path / "log"
    run = [*settings(latents, engine), "train.cpu_threads=2", f"train.checkpoint_every={EVERY}"]
    changes = ["train.num_steps=1000000", "train.keep_checkpoints=1000000", "train.max_failures=0"]
    process = nodes.start("train_dit", "--output", str(broken), *run, *changes, log=log)
    reached = 0
    for count, (notice, reason) in enumerate(NOTICES.items(), start=1):
        while wait_for_checkpoint(broken, process) <= reached:
            time.sleep(0.1)
        node = nodes.nodes[-1]
        if notice != "SIGTERM to a worker":
            nodes.add_node(CPUS)
        match notice:
            case "drain":
                nodes.drain_node(node, SECONDS)
            case "SIGTERM to the node":
                node.send_signal(signal.SIGTERM)
            case "SIGTERM to a worker":
                train_workers(nodes.ray_folder)[-1].send_signal(signal.SIGTERM)
        wait_for_line(log, rf"(Preemption: [\s\S]*){{{count}}}; the attempt ends after step \d+\n")
        if notice != "SIGTERM to a worker":
            nodes.kill_node(node)
        wait_for_line(log, rf"(resuming from the checkpoint of step [\s\S]*){{{count}}}\n")
        ends = re.findall(r"Preemption: (.*); the attempt ends after step (\d+)\n", log.read_text())
        assert len(ends) == count
        assert reason in ends[-1][0]
        # The next attempt starts at the step that the preempted one had reached.
        assert re.findall(r"resuming from the checkpoint of step (\d+)\n", log.read_text()) == [
            step for _, step in ends
        ]
        reached = int(ends[-1][1])
    while (now := wait_for_checkpoint(broken, process)) <= reached:
        time.sleep(0.1)
    nodes.kill(process)
    assert "An attempt failed" not in log.read_text()

    last = now // EVERY * EVERY
    nodes.run("train_dit", "--output", str(whole), *run, f"train.num_steps={last}", timeout=PATIENCE).expect(0)
    end = last_checkpoint(whole)
    [same] = (broken / "ray").glob(f"checkpoint-{last:08d}-*")
    assert (end / "state.json").read_text() == (same / "state.json").read_text()
    files = sorted(file.name for group in GROUPS for file in end.glob(f"{group}-*.safetensors"))
    assert len(files) == 2 * len(GROUPS)
    for name in files:
        assert_equal_files(end / name, same / name)
    losses = [json.loads((folder / "history.json").read_text())["loss"] for folder in (whole, broken)]
    assert losses[0] == [point for point in losses[1] if point[0] <= last]
    assert [step for step, _ in losses[0]] == list(range(EVERY, last + 1, EVERY))
