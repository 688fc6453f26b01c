"""The examples of clients against a running service."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from example_files import example

from .conftest import Serve, eventually


def test_call_the_endpoint(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    served = serve()
    example("call_the_endpoint").main([served.url, str(tmp_path / "video.mp4"), "--frames", "4"])
    assert (tmp_path / "video.mp4").read_bytes()[4:8] == b"ftyp"
    assert "completed 100 %" in capsys.readouterr().out


def test_change_a_served_video(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    served = serve()
    let = served.hold()
    command = [served.url, str(tmp_path / "video.mp4"), "class_label=ring", "class_label=disc", "--frames", "32"]
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(example("change_a_served_video").main, command)

        def is_changed() -> bool:
            let(1)
            videos = served.client.get("/v1/videos").json()["data"]
            return done.done() or any(video["changes"] for video in videos)

        eventually(is_changed)
        let(math.inf)
        done.result()
    [video] = served.client.get("/v1/videos").json()["data"]
    [change] = video["changes"]
    assert (video["class_label"], change["class_label"], change["status"]) == (1, 0, "applied")
    assert 0 < change["from_frame"] < 32
    assert f"change: applied from frame {change['from_frame']}" in capsys.readouterr().out
    assert (tmp_path / "video.mp4").read_bytes()[4:8] == b"ftyp"
