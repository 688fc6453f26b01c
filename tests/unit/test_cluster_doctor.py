"""The checks of ``ardiff doctor --address``. No Ray is started."""

import contextlib
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ray_jobs import doctor
from ray_jobs.diagnostics import nodes as nodes_module
from ray_jobs.diagnostics.all_reduce import bandwidth
from ray_jobs.diagnostics.nodes import (
    Node,
    NodeProbe,
    Shared,
    check_database,
    check_drivers,
    check_gpus,
    check_versions,
    examine_nodes,
)
from ray_jobs.runtime.job_client import Submission


def node(name: str, gpus: int = 0, cpus: float = 8, versions: dict[str, str] | None = None) -> Node:
    return Node(name, versions or {}, ["A100"] * gpus, gpus, cpus, 0.0, 0, "580.1" if gpus else "", "13.0", "", "")


@pytest.mark.parametrize("uri", ["mysql://a/b", "/data/jobs.sqlite", "postgresql://a:secret@b/c"])
def test_a_wrong_database_is_rejected_before_a_job_is_submitted(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        doctor.main(["--address", "http://127.0.0.1:9", "--database", uri])
    assert "error: database " in capsys.readouterr().err


def test_too_few_gpus_fail() -> None:
    head = node("head", cpus=0)
    assert check_gpus([head], 0) == ("gpus", True, "none now: --gpus N waits until an autoscaler has started N")
    name, ok, text = check_gpus([head], 8)
    assert (name, ok) == ("gpus", False)
    assert text.startswith("none, but 8 are wanted")
    assert check_gpus([head, node("worker", 8)], 8) == ("gpus", True, "8 A100")


def test_old_drivers_are_named() -> None:
    old = replace(node("b", 8), driver="550.54")
    texts = [(finding.ok, finding.text) for finding in check_drivers([node("head"), node("a", 8), old])]
    assert [ok for ok, _ in texts] == [True, False]
    assert texts[1][1].startswith("b: 550.54, but torch's CUDA 13.0 needs 580")


def test_other_versions_are_named() -> None:
    usual = {"python": "3.11.7", "ray": "2.60.0"}
    assert check_versions([node("a", versions=usual), node("b", versions=usual)], "3.11/2.60.0").ok
    assert not check_versions([node("a", versions=usual)], "3.12/2.60.0").ok
    cluster = [node(name, versions=usual) for name in "ab"] + [node("c", versions={**usual, "ray": "2.59.0"})]
    assert check_versions(cluster, "3.11/2.60.0").text.startswith("ray is 2.60.0, but c has 2.59.0")


def test_nodes_are_examined_after_a_wait_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    awaited: list[tuple[str, int]] = []
    monkeypatch.setattr(nodes_module, "await_resource", lambda kind, count: awaited.append((kind, count)))
    monkeypatch.setattr(nodes_module.ray, "nodes", lambda: [])
    monkeypatch.setattr(nodes_module.ray, "get", lambda values: values)
    assert examine_nodes(Shared(), 8) == []
    assert awaited == [("GPU", 8)]


@pytest.mark.parametrize(
    ("gpus", "cpus", "hosts", "expected"),
    [
        ((8, 8), (8, 8), {"a"}, False),  # the other machine was busy
        ((8, 8), (8, 8), {"a", "b"}, True),
        ((8, 0), (8, 8), {"a"}, True),  # one machine with GPUs
        ((0, 0), (8, 8), {"a"}, False),
        ((0, 0), (0, 8), {"b"}, True),  # the head runs no tasks
    ],
)
def test_an_all_reduce_inside_one_of_several_nodes_fails(
    gpus: tuple[int, int], cpus: tuple[int, int], hosts: set[str], expected: bool
) -> None:
    nodes = [node(name, *counts) for name, *counts in zip("ab", gpus, cpus, strict=True)]
    _, ok, text = bandwidth(nodes, any(gpus), hosts, workers=2, megabytes=64, seconds=0.1)
    assert ok == expected
    assert ("all on one of 2 nodes" in text) != expected


def test_arguments_reach_the_cluster_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    submissions: list[Submission] = []

    @contextlib.contextmanager
    def connection(*arguments: Any) -> Iterator[None]:
        yield None

    def run(client: None, submission: Submission, quiet: bool) -> int:
        submissions.append(submission)
        return 0

    monkeypatch.setattr(doctor, "connection", connection)
    monkeypatch.setattr(doctor, "run", run)
    assert doctor.main(["--address", "http://127.0.0.1:9", "--storage", "/mnt/a b;ls", "--gpus", "8"]) == 0
    assert {"--storage=/mnt/a b;ls", "--gpus=8"} <= set(shlex.split(submissions[0].entrypoint))


def test_each_node_uses_the_database(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite").touch()
    good, bad = (
        NodeProbe("a", {}).examine(Shared(database=str(tmp_path / name)), 0.0) for name in ("jobs.sqlite", "no")
    )
    assert check_database([good], "uri").ok
    name, ok, text = check_database([good, bad], "uri")
    assert (name, ok) == ("database", False)
    assert text.startswith("a: The database of jobs is unavailable: unable to open")
    assert check_database([good], None).ok
