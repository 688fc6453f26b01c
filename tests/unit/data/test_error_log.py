"""The error log counts every bad sample once; too many are an error that names the most frequent kinds."""

from pathlib import Path

import pytest

from ardiff.data.error_log import BadSample, ErrorLog, bad_sample, read_errors, too_short, write_errors
from ardiff.data.manifest import VideoRecord, usable
from ardiff.errors import ClipTooShortError, DataError, DecodeError, StorageError


def bad(uri: str, clip: int = -1, error: str = "corrupt") -> BadSample:
    return BadSample(uri, clip, error, f"{uri} is bad.", 1)


def test_rows_go_there_and_back_in_order(tmp_path: Path) -> None:
    place = f"{tmp_path}/errors.parquet"
    assert read_errors(place) == []
    write_errors(place, [])
    assert read_errors(place) == []
    write_errors(place, [bad("b"), bad("a", 9), bad("a", 2)])
    assert read_errors(place) == [bad("a", 2), bad("a", 9), bad("b")]
    Path(place).write_bytes(b"no parquet")
    with pytest.raises(DataError, match="is not an error log"):
        read_errors(place)


def test_clips_and_videos_are_counted_once() -> None:
    for unit, count in (("video", 2), ("clip", 3)):
        log = ErrorLog(10, 0.5, unit)  # type: ignore[arg-type]
        assert [log.add(b) for b in (bad("a", 1), bad("a", 2), bad("a", 1), bad("b", 1))] == [
            True,
            True,
            False,
            True,
        ]
        assert log.count == count
        log.check()


def test_too_many_fail_and_the_kinds_that_dominate_are_named() -> None:
    log = ErrorLog(40, 0.1, "video", [bad(f"{i}", error="truncated") for i in range(3)])
    log.add(bad("x", error="empty"))
    log.check()
    log.add(bad("y", error="empty"))
    expected = (
        r"5 of 40 videos are bad \(12.5%\), more than max_bad_fraction=0.1 allows: 3 truncated \(0 is bad\); 2 empty"
    )
    with pytest.raises(DataError, match=expected):
        log.check()
    with pytest.raises(DataError):
        ErrorLog(0, 0.5, "video", [bad("a")]).check()


def test_errors_become_rows_unless_storage_is_away() -> None:
    damage = DecodeError("it is damaged")
    damage.kind = "corrupt"
    assert bad_sample("a", 3, damage) == BadSample("a", 3, "corrupt", "it is damaged", 1)
    assert bad_sample("a", 3, ClipTooShortError("it is short")).error == "too short"
    gone = StorageError("Cannot read a")
    gone.attempts = 4
    assert bad_sample("a", -1, gone) == BadSample("a", -1, "unreadable", "Cannot read a", 4)
    gone.transient = True
    with pytest.raises(StorageError):
        bad_sample("a", -1, gone)


def test_videos_too_short_for_a_clip_have_rows_and_do_not_count() -> None:
    lengths = {"a": 7, "b": 20, "c": 9, "tested": 7}
    records = [
        VideoRecord(uri, 1, "h264", 64, 48, 8.0, n, 0, "x", "test" if uri == "tested" else "train", "ok", "")
        for uri, n in lengths.items()
    ]
    short = too_short(records, "train", 10)
    assert short == [BadSample(u, -1, "too short", f"it has {lengths[u]} frames, a clip needs 10", 1) for u in "ac"]
    kept = [r.uri for r in usable(records, "train", 10)]
    assert sorted([*kept, *(row.uri for row in short)]) == ["a", "b", "c"]
    slow = too_short(records, "train", 8, fps=4.0)
    assert [row.message for row in slow] == [f"it has {n} frames at 4 frames/s, a clip needs 8" for n in (4, 5)]
    log = ErrorLog(1, 0.0, "video", excluded=short)
    log.check()
    assert (log.count, log.summary(), log.all_rows) == (0, "", short)
