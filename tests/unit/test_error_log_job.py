"""The error log of a job: rows are written soon, and the original error of the job is kept."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ray_jobs.runtime.error_log as module
from ardiff.data.error_log import BadSample, ErrorLog, read_errors, write_errors
from ardiff.errors import DataError, StorageError


def bad(uri: str) -> BadSample:
    return BadSample(uri, -1, "corrupt", "it is bad", 1)


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Actors become objects of this process; those that were made."""
    made: list[Any] = []

    class Handle:
        def __init__(self, *arguments: Any) -> None:
            self.actor = module._ErrorLogActor(*arguments)
            made.append(self.actor)

        def __getattr__(self, name: str) -> Any:
            return SimpleNamespace(remote=getattr(self.actor, name))

    remote = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=Handle))
    monkeypatch.setattr(module, "ray", SimpleNamespace(remote=lambda _: remote, get=lambda value: value))
    return made


def test_a_row_is_stored_within_the_pause_without_another_to_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, elapsed, waits = str(tmp_path / "errors.parquet"), threading.Event(), list[float]()

    def timer(wait: float, function: Any) -> threading.Thread:
        waits.append(wait)
        return threading.Thread(target=lambda: (elapsed.wait(), function()))

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 100.0))
    monkeypatch.setattr(module, "threading", SimpleNamespace(Lock=threading.Lock, Timer=timer))
    actor = module._ErrorLogActor(uri, ErrorLog(10, 1.0, "video"), interval=0.3)
    for name in "abc":
        assert actor.add(bad(name)) is None
    assert [row.uri for row in read_errors(uri)] == ["a"]
    assert waits == [pytest.approx(0.3)]
    late = actor.timer
    elapsed.set()
    late.join()
    assert [row.uri for row in read_errors(uri)] == ["a", "b", "c"]


def test_rows_of_videos_that_are_there_no_more_do_not_count(tmp_path: Path, actors: list[Any]) -> None:
    uri = str(tmp_path / "errors.parquet")
    write_errors(uri, [bad("a"), bad("gone"), bad("b")])
    with module.error_log(str(tmp_path), 3, 0.7, "video", {"a", "b", "c"}, [bad("short")]) as report:
        assert actors[0].log.count == 2
        assert [row.uri for row in read_errors(uri)] == ["a", "b", "short"]
        with pytest.raises(DataError, match="3 of 3 videos are bad"):
            report(bad("c"))
    assert [row.uri for row in read_errors(uri)] == ["a", "b", "c", "short"]


def test_what_ends_a_job_is_not_hidden_by_storage_that_is_away(
    tmp_path: Path, actors: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> None:
        raise StorageError("Cannot write")

    monkeypatch.setattr(module._ErrorLogActor, "flush", away)
    with pytest.raises(ValueError, match="the reason"), module.error_log(str(tmp_path), 3, 0.5, "video"):
        raise ValueError("the reason")
    with pytest.raises(StorageError, match="Cannot write"), module.error_log(str(tmp_path), 3, 0.5, "video"):
        pass
