"""examples/call_the_endpoint.py against a running service."""

from pathlib import Path

import pytest
from example_files import example

from .conftest import Serve


def test_call_the_endpoint(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    served = serve()
    example("call_the_endpoint").main([served.url, str(tmp_path / "video.mp4"), "--frames", "4"])
    assert (tmp_path / "video.mp4").read_bytes()[4:8] == b"ftyp"
    assert "completed 100 %" in capsys.readouterr().out
