"""The examples that need neither Ray nor a service, and the rules for all of them."""

import ast
import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from example_files import EXAMPLES, example

from ardiff.data.encode import encode_video


@pytest.fixture(scope="module")
def pipeline(make_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("example") / "pipeline"
    make_pipeline().save_pretrained(str(folder))
    return str(folder)


def count_frames(video: bytes) -> int:
    with av.open(io.BytesIO(video)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short_and_say_how_to_run_them(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60
    assert f"python examples/{path.name}" in (ast.get_docstring(ast.parse(path.read_text())) or "")


def test_sample_and_stream(pipeline: str, tmp_path: Path) -> None:
    example("sample_and_stream").main([pipeline, str(tmp_path / "out"), "--frames", "17", "--steps", "4"])
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["0.mp4", "1.mp4", "frame-0000.png", "frame-0008.png", "frame-0016.png"]
    assert count_frames((tmp_path / "out" / "0.mp4").read_bytes()) == 16


def test_continue_a_clip(pipeline: str, tmp_path: Path) -> None:
    frames = np.full((10, 20, 24, 3), 200, np.uint8)
    (tmp_path / "clip.mp4").write_bytes(encode_video(frames, 8))
    files = [str(tmp_path / "clip.mp4"), str(tmp_path / "longer.mp4")]
    example("continue_a_clip").main([pipeline, *files, "--frames", "9", "--steps", "4"])
    assert count_frames((tmp_path / "longer.mp4").read_bytes()) == 9


def test_change_the_condition(pipeline: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [pipeline, str(tmp_path / "video.mp4"), "--frames", "30", "--steps", "4"]
    example("change_the_condition").main([*run, "class_label=ring", "class_label=disc", "class_label=square"])
    first, second = (int(line.split()[-2]) for line in capsys.readouterr().out.splitlines())
    assert 10 <= first < second < 30
    assert count_frames((tmp_path / "video.mp4").read_bytes()) == 30
    with pytest.raises(SystemExit):
        example("change_the_condition").main([*run, "class_label=cube"])
    assert "class_label=cube is neither prompt=TEXT nor class_label= one of ['disc'" in capsys.readouterr().err


def test_write_an_extractor(capsys: pytest.CaptureFixture[str]) -> None:
    example("write_an_extractor").main()
    same, dark = (float(part.split()[-1]) for part in capsys.readouterr().out.split(","))
    assert same < 0.01 < 0.5 < dark


def test_the_notebook_plays_videos(pipeline: str) -> None:
    cells = json.loads((EXAMPLES / "play_videos.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    shown = []
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == []  # results do not belong into the repository
        code = ast.parse("".join(cell["source"]))
        last = code.body.pop() if isinstance(code.body[-1], ast.Expr) else None
        exec(compile(code, "notebook", "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), "notebook", "eval"), names))
        if "PIPELINE" in names:
            names |= {"PIPELINE": pipeline, "STEPS": 4}
    assert [value._repr_html_().count('<video src="data:video/mp4;base64,') for value in shown[1:]] == [3, 1]
    assert "frames=" not in repr(shown[1])
    assert names["pipeline"](num_frames=2, num_inference_steps=2)._repr_html_() is None
