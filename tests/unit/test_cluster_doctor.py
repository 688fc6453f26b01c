"""What ``ardiff doctor --address`` makes of what it sees. No Ray is started."""

import contextlib
import shlex
from collections.abc import Iterator
from typing import Any

import pytest

from ray_jobs import doctor
from ray_jobs.doctor import Node, _bandwidth, _gpus
from ray_jobs.submit import Submission


def node(name: str, gpus: int = 0, cpus: float = 8) -> Node:
    return Node(name, {}, ["A100"] * gpus, gpus, cpus, 0.0, 0, "")


def test_a_cluster_scaled_to_nothing_is_not_well_if_gpus_are_wanted() -> None:
    head = node("head", cpus=0)
    assert _gpus([head], 0) == ("gpus", True, "none now: --gpus N waits for N, where nodes come with work")
    name, good, text = _gpus([head], 8)
    assert (name, good) == ("gpus", False)
    assert text.startswith("none, but 8 are wanted")
    assert _gpus([head, node("worker", 8)], 8) == ("gpus", True, "8 A100")


def test_gpus_are_waited_for_before_nodes_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(doctor, "await_resource", lambda kind, count: asked.append((kind, count)))
    monkeypatch.setattr(doctor.ray, "nodes", lambda: [])
    with doctor._probes(8) as probes:
        assert probes == {}
    assert asked == [("GPU", 8)]


@pytest.mark.parametrize(
    ("gpus", "cpus", "places", "good"),
    [
        ((8, 8), (8, 8), {"a"}, False),  # the other machine was busy
        ((8, 8), (8, 8), {"a", "b"}, True),
        ((8, 0), (8, 8), {"a"}, True),  # one machine with GPUs
        ((0, 0), (8, 8), {"a"}, False),
        ((0, 0), (0, 8), {"b"}, True),  # the head does no work
    ],
)
def test_an_all_reduce_inside_one_of_several_nodes_says_so(
    gpus: tuple[int, int], cpus: tuple[int, int], places: set[str], good: bool
) -> None:
    nodes = [node(name, *counts) for name, *counts in zip("ab", gpus, cpus, strict=True)]
    _, found, text = _bandwidth(nodes, any(gpus), places, workers=2, megabytes=64, seconds=0.1)
    assert found == good
    assert ("all on one of 2 nodes" in text) != good


def test_arguments_reach_the_cluster_as_they_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Submission] = []

    @contextlib.contextmanager
    def connection(*arguments: Any) -> Iterator[None]:
        yield None

    def run(client: None, submission: Submission, told: bool) -> int:
        sent.append(submission)
        return 0

    monkeypatch.setattr(doctor, "connection", connection)
    monkeypatch.setattr(doctor, "run", run)
    assert doctor.main(["--address", "http://127.0.0.1:9", "--storage", "/mnt/a b;ls", "--gpus", "8"]) == 0
    assert {"--storage=/mnt/a b;ls", "--gpus=8"} <= set(shlex.split(sent[0].entrypoint))
