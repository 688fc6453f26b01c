from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from ardiff.cli import main
from ardiff.config import build
from ardiff.errors import ConfigError
from ardiff.sweep.grid import Cell, GridConfig, Storing, cells_of, labels_of, row_id, rows_of
from ardiff.sweep.models import SweptModel
from ardiff.sweep.rows import VideoRow

GRID = GridConfig(
    checkpoints=("m",), ar_steps=(1, 5), num_frames=(8, 20), num_inference_steps=(5,), guidance_scales=(1, 2.5), seeds=3
)
STORING = Storing(output="out", fps=8.0, codec="h264", crf=8, latents=False)


@pytest.fixture(scope="module")
def model(make_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> SweptModel:
    folder = str(tmp_path_factory.mktemp("model"))
    make_pipeline().save_pretrained(folder)
    return SweptModel.load(folder)


def rows(grid: GridConfig, model: SweptModel, storing: Storing = STORING) -> list[VideoRow]:
    return [row for cell in cells_of(grid, [model], "window", "fp32") for row in rows_of(grid, cell, storing)]


def test_rows_are_the_product_and_none_is_twice(model: SweptModel) -> None:
    found = rows(GRID, model)
    assert len(found) == 2 * 2 * 2 * 3 * 3  # ar_steps, frames, guidance, classes, seeds
    for name in ("id", "uri", "record"):
        assert len({getattr(row, name) for row in found}) == len(found)
    assert {(row.label, row.class_name) for row in found} == {(0, "disc"), (1, "ring"), (2, "square")}
    assert all(row.uri.startswith(str(Path("out").absolute())) for row in found)


def test_a_row_keeps_its_id_and_place_in_another_grid(model: SweptModel) -> None:
    small = GridConfig(checkpoints=("m",), ar_steps=(5,), num_frames=(20,), num_inference_steps=(5,), seeds=1)
    larger = {row.id: row for row in rows(GRID, model)}
    assert {row.id: row for row in rows(small, model)}.items() <= larger.items()


def test_an_id_names_all_that_frames_depend_on_and_nothing_else(model: SweptModel) -> None:
    row = rows(GRID, model)[0]
    frames = {"weights", "num_frames", "ar_step", "num_inference_steps", "guidance_scale", "mode", "precision"}
    frames |= {"label", "seed"}
    for field in fields(VideoRow):
        other = replace(row, **{field.name: 77 if field.type == "int" else "77"})
        assert (row_id(other) != row.id) == (field.name in frames), field.name


def test_latents_and_codecs_have_places(model: SweptModel) -> None:
    row = rows(GRID, model, Storing(output="s3://b/o", fps=8.0, codec="vp9", crf=30, latents=True))[0]
    assert row.uri.startswith("s3://b/o/videos/")
    assert row.uri.endswith(".webm")
    assert row.latents.startswith("s3://b/o/latents/")


def test_cells_are_named_by_their_settings_alone(model: SweptModel) -> None:
    cells = cells_of(GRID, [model], "window", "fp32")
    assert len({cell.name for cell in cells}) == len(cells) == 8
    assert cells[0].name == f"ar1-f8-s5-g1-{model.weights[:8]}"
    [plain, *_] = cells_of(GRID, [model], "full", "bf16")
    assert plain.name == f"ar1-f8-s5-g1-full-bf16-{model.weights[:8]}"


def test_guidance_costs_a_second_branch(model: SweptModel) -> None:
    cells = cells_of(GRID, [model], "window", "fp32")
    cost = {(c.num_frames, c.ar_step, c.guidance_scale): c.evaluations for c in cells}
    assert cost[8, 5, 1.0] == 8 * 5 + 7
    assert cost[8, 5, 2.5] == 2 * cost[8, 5, 1.0]
    assert cells[0].passes == 5 + 7


def test_what_a_model_cannot_make_is_refused_with_the_reason(
    model: SweptModel, make_pipeline: Any, tmp_path: Path
) -> None:
    def refusal(**changes: Any) -> str | None:
        return replace(cells_of(GRID, [model], "window", "fp32")[0], **changes).refusal()

    cell = cells_of(GRID, [model], "window", "fp32")[0]
    assert refusal() is None
    assert cell.refusal(2) is None
    assert "has classes 0..2" in str(cell.refusal(3))
    assert "smallest valid ar_step is 1" in str(refusal(ar_step=0, num_frames=20))
    assert "got 6" in str(refusal(ar_step=6))
    assert "between 1 and 1000" in str(refusal(num_inference_steps=1001))
    assert "attention_window" in str(refusal(mode="rolling", num_frames=20))
    assert refusal(mode="rolling") is None
    make_pipeline(attention="bidirectional").save_pretrained(str(tmp_path / "b"))
    other = SweptModel.load(str(tmp_path / "b"))
    assert "mode=full" in str(other.refusal("window", 8, 5, 1))
    assert other.refusal("full", 8, 5, 1) is None


def test_a_model_without_classes_has_one_row_a_seed(make_pipeline: Any, tmp_path: Path) -> None:
    make_pipeline(num_classes=0).save_pretrained(str(tmp_path))
    model = SweptModel.load(str(tmp_path))
    assert labels_of(GRID, model) == [-1]
    cell: Cell = cells_of(GRID, [model], "window", "fp32")[0]
    assert [(r.label, r.class_name) for r in rows_of(GRID, cell, STORING)] == [(-1, "")] * 3
    assert "has no classes" in str(cell.refusal(0))


def test_one_model_by_two_names_is_refused(model: SweptModel) -> None:
    with pytest.raises(ConfigError, match="same to six digits"):
        cells_of(replace(GRID, guidance_scales=(1.5, 1.5000001)), [model], "window", "fp32")
    with pytest.raises(ConfigError, match="same model"):
        cells_of(GRID, [model, replace(model, uri="elsewhere")], "window", "fp32")


@pytest.mark.parametrize(
    "settings", [{"ar_steps": []}, {"ar_steps": [5, 5]}, {"seeds": 0}, {"classes": []}, {"checkpoints": ["a", "a"]}]
)
def test_bad_grids_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        build(GridConfig, settings)


def test_a_dry_run_shows_the_grid(make_pipeline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pipeline().save_pretrained(str(tmp_path / "m"))
    grid = ["grid.ar_steps=[0,5]", "grid.num_frames=[8,20]", "grid.num_inference_steps=[5]", "grid.seeds=2"]
    checkpoints = f"grid.checkpoints=[{tmp_path / 'm'},s3://nowhere/x]"
    assert main(["sweep", "--dry-run", f"output={tmp_path / 'out'}", checkpoints, *grid]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# ")]
    assert [line.split()[2:5] for line in lines[1:5]] == [
        ["0", "8", "5"],
        ["5", "8", "5"],
        ["0", "20", "5"],
        ["5", "20", "5"],
    ]
    assert "refused: ar_step must be between 1" in lines[3]
    assert "18 videos" in lines[5]
    assert "s3://nowhere/x: no pipeline on this machine" in lines[6]
    assert not (tmp_path / "out").exists()
