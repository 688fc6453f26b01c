"""The videos that ``ardiff prepare`` finds, before it probes them."""

from pathlib import Path

import pytest

from ardiff.data.manifest import VideoRecord
from ray_jobs import prepare
from ray_jobs.prepare import PrepareConfig, _sheet_resolution, describe_plan, find_videos


def test_the_output_folder_is_no_part_of_the_set(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4", "out/sheet.png", "out/latents/c.mp4", "output.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    config = PrepareConfig(source=str(tmp_path), output=f"{tmp_path}/out/")
    assert [Path(r.uri).name for r in find_videos(config, str(tmp_path)).records] == ["a.mp4", "b.mp4", "output.mp4"]


def test_lines_that_name_no_video_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[str] = []
    monkeypatch.setattr(prepare, "print_line", printed.append)
    for name in ("videos/ape/a.mp4", "videos/bat/b.mp4", "videos/cat/c.mp4", "videos/cat/d.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "train.txt").write_text("bat/b.mp4\ncat/gone.mp4 2\n")
    (tmp_path / "test.txt").write_text("cat/c.mp4\n")
    source = str(tmp_path / "videos")
    config = PrepareConfig(source=source, train_list=f"{tmp_path}/train.txt", test_list=f"{tmp_path}/test.txt")
    videos = [(r.class_name, r.label, r.split, r.status) for r in find_videos(config, source).records]
    assert videos == [
        ("", 0, "train", "skipped"),
        ("bat", 0, "train", ""),
        ("cat", 1, "test", ""),
        ("", 0, "train", "skipped"),
    ]
    assert printed == [f"[yellow]1 lines of the lists[/] match no video of {source}, such as cat/gone.mp4 2"]


def test_the_sheet_has_the_shape_of_the_videos_if_they_agree() -> None:
    def record(width: int, height: int) -> VideoRecord:
        return VideoRecord("a.mp4", 1, "h264", width, height, 8.0, 4, 0, "x", "train", "ok", "")

    assert _sheet_resolution([record(64, 64)]) == (96, 96)
    assert _sheet_resolution([record(1280, 720)] * 2) == (72, 128)
    assert _sheet_resolution([record(1280, 720), record(720, 1280)]) == (96, 96)
    assert _sheet_resolution([]) == (96, 96)


def test_the_plan_of_a_dry_run_names_what_it_has_not_looked_at(tmp_path: Path) -> None:
    plan = describe_plan(PrepareConfig(source="s3://bucket/set/", output="runs/set"))
    expected = "videos stay where they are, those of tables are written to runs/set/videos"
    assert plan == f"s3://bucket/set/ is not listed: {expected}"
    for source in ("s3://bucket/list.csv", "s3://bucket/shard.tar", str(tmp_path), None):
        assert describe_plan(PrepareConfig(source=source)) == "nothing is copied: videos stay where they are"
