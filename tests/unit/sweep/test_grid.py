from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from toy_text import ToyEncoder

from ardiff.cli import main
from ardiff.config import build
from ardiff.errors import ConfigError
from ardiff.sampling.params import PER_VIDEO, SamplingParams
from ardiff.sweep.grid import GridConfig, point_specs, subjects, sweep_points
from ardiff.sweep.models import SweptModel
from ardiff.sweep.specs import OutputSettings, VideoSpec

GRID = GridConfig(
    checkpoints=("m",),
    sampling=SamplingParams(num_inference_steps=5),
    axes={"num_frames": [8, 20], "guidance_scale": [1, 2.5], "ar_step": [1, 5]},
    seeds=3,
)
OUTPUT = OutputSettings(output="out", fps=8.0, codec="h264", crf=8)


@pytest.fixture(scope="module")
def model(make_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> SweptModel:
    folder = str(tmp_path_factory.mktemp("model"))
    make_pipeline().save_pretrained(folder)
    return SweptModel.load(folder)


def specs_of(grid: GridConfig, model: SweptModel, output: OutputSettings = OUTPUT) -> list[VideoSpec]:
    return [spec for point in sweep_points(grid, [model], "fp32") for spec in point_specs(grid, point, output)]


def test_specs_are_the_product_and_none_is_twice(model: SweptModel) -> None:
    specs = specs_of(GRID, model)
    assert len(specs) == 2 * 2 * 2 * 3 * 3  # ar_step, frames, guidance, classes, seeds
    for name in ("id", "uri", "record"):
        assert len({getattr(spec, name) for spec in specs}) == len(specs)
    assert {(s.sampling.class_label, s.class_name) for s in specs} == {(0, "disc"), (1, "ring"), (2, "square")}
    assert all(spec.uri.startswith(str(Path("out").absolute())) for spec in specs)


def test_a_spec_is_the_same_in_another_grid(model: SweptModel) -> None:
    params = SamplingParams(num_inference_steps=5, num_frames=20, ar_step=5)
    small = GridConfig(checkpoints=("m",), sampling=params, seeds=1)
    larger = {spec.id: spec for spec in specs_of(GRID, model)}
    assert {spec.id: spec for spec in specs_of(small, model)}.items() <= larger.items()


def test_every_sampling_parameter_is_an_axis(model: SweptModel) -> None:
    values = {"mode": ["window", "full"], "ar_step": [2, 3], "solver": ["ddim", "unipc"]}
    values["timestep_spacing"] = ["trailing", "log_snr"]
    values["size"] = [f"{model.info.resolution.width}x{model.info.resolution.height}"]
    values |= {"prompt": ["a", "b"], "negative_prompt": ["a", "b"], "conditions": [[{"frame": 1, "prompt": "a"}], []]}
    for field in fields(SamplingParams):
        axes = {field.name: values.get(field.name, [6, 7])}
        if field.name in (*PER_VIDEO, "given_frames"):
            with pytest.raises(ConfigError, match=f"{field.name} cannot be a sampling parameter of a grid"):
                build(GridConfig, {"axes": axes})
        else:
            points = sweep_points(build(GridConfig, {"axes": axes}), [model], "fp32")
            assert [getattr(point.params, field.name) for point in points] == axes[field.name]


def test_latents_and_codecs_have_files(model: SweptModel) -> None:
    output = OutputSettings(output="s3://b/o", fps=8.0, codec="vp9", crf=30, keep_latents=True)
    spec = specs_of(GRID, model, output)[0]
    assert spec.uri.startswith("s3://b/o/videos/")
    assert spec.uri.endswith(".webm")
    assert spec.latents.startswith("s3://b/o/latents/")


def test_points_are_named_by_their_parameters_alone(model: SweptModel) -> None:
    points = sweep_points(GRID, [model], "fp32")
    assert len({point.name for point in points}) == len(points) == 8
    assert points[0].name == f"f8-s5-ar1-{model.weights[:8]}"
    assert points[-1].name == f"f20-s5-ar5-g2.5-{model.weights[:8]}"
    full = replace(GRID, sampling=replace(GRID.sampling, mode="full"))
    assert sweep_points(full, [model], "bf16")[0].name == f"f8-s5-ar1-mode-full-bf16-{model.weights[:8]}"


def test_guidance_costs_a_second_branch(model: SweptModel) -> None:
    points = sweep_points(GRID, [model], "fp32")
    costs = {(p.params.num_frames, p.params.ar_step, p.params.guidance_scale): p.evaluations for p in points}
    assert costs[8, 5, 1.0] == 8 * 5 + 7
    assert costs[8, 5, 2.5] == 2 * costs[8, 5, 1.0]
    assert points[0].passes == 5 + 7


def test_points_that_the_model_cannot_sample_have_the_reason(
    model: SweptModel, make_pipeline: Any, tmp_path: Path
) -> None:
    def error(other: SweptModel = model, **sampling: Any) -> str | None:
        params = SamplingParams(**{"num_inference_steps": 5, "num_frames": 8, "ar_step": 1, **sampling})
        [point] = sweep_points(GridConfig(checkpoints=("m",), sampling=params), [other], "fp32")
        return point.error

    assert error() is None
    assert "smallest valid ar_step is 1" in str(error(ar_step=0, num_frames=20))
    assert "got 6" in str(error(ar_step=6))
    assert "between 1 and 1000" in str(error(num_inference_steps=1001))
    assert "attention_window" in str(error(mode="rolling", num_frames=20))
    assert error(mode="rolling") is None
    make_pipeline(attention="bidirectional").save_pretrained(str(tmp_path / "b"))
    other = SweptModel.load(str(tmp_path / "b"))
    assert "mode=full" in str(error(other))
    assert error(other, mode="full") is None


def test_ar_step_is_filled_in(model: SweptModel) -> None:
    [point] = sweep_points(GridConfig(checkpoints=("m",)), [model], "fp32")
    assert point.params.ar_step == 5 + 2  # 16 frames of 50 steps in a window of 8
    assert point.name == f"ar7-{model.weights[:8]}"


def test_a_model_without_classes_has_one_spec_per_seed(make_pipeline: Any, tmp_path: Path) -> None:
    make_pipeline(num_classes=0).save_pretrained(str(tmp_path))
    model = SweptModel.load(str(tmp_path))
    assert subjects(GRID, model) == [(None, None)]
    point = sweep_points(GRID, [model], "fp32")[0]
    specs = point_specs(GRID, point, OUTPUT)
    assert [(s.sampling.class_label, s.class_name) for s in specs] == [(None, "")] * 3
    assert all("/no-class-seed-" in s.uri for s in specs)


def test_equal_points_and_equal_models_are_rejected(model: SweptModel) -> None:
    for axes in ({"guidance_scale": [1.5, 1.5000001]}, {"ar_step": [None, 7]}):
        with pytest.raises(ConfigError, match="same parameters, to six digits"):
            sweep_points(GridConfig(checkpoints=("m",), axes=axes), [model], "fp32")
    with pytest.raises(ConfigError, match="same model"):
        sweep_points(GRID, [model, replace(model, uri="elsewhere")], "fp32")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"axes": {"ar_step": []}}, "ar_step must hold"),
        ({"axes": {"ar_step": [5, 5]}}, "ar_step must hold"),
        ({"axes": {"ar_step": 5}}, r"'grid\.axes\.ar_step' must be a list"),
        ({"axes": {"ar_steps": [5]}}, r"'grid\.axes\.ar_steps': did you mean 'grid\.axes\.ar_step'"),
        ({"axes": {"num_frames": ["many"]}}, r"'grid\.axes\.num_frames' must be of type int, not 'many'"),
        ({"axes": {"mode": ["magic"]}}, r"'grid\.axes\.mode' must be one of window, rolling, full"),
        ({"sampling": {"seed": 3}}, "seed cannot be"),
        ({"seeds": 0}, "seeds must be"),
        ({"classes": []}, "classes must hold"),
        ({"checkpoints": ["a", "a"]}, "checkpoints must hold"),
    ],
)
def test_bad_grids_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(GridConfig, settings)


def test_a_dry_run_shows_the_grid(make_pipeline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pipeline().save_pretrained(str(tmp_path / "m"))
    grid = ["grid.axes.num_frames=[8,20]", "grid.axes.ar_step=[0,5]"]
    grid += ["grid.sampling.num_inference_steps=5", "grid.seeds=2"]
    checkpoints = f"grid.checkpoints=[{tmp_path / 'm'},s3://nowhere/x]"
    assert main(["sweep", "--dry-run", f"output={tmp_path / 'out'}", checkpoints, *grid]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# ")]
    assert [line.split()[2] for line in lines[1:5]] == ["f8-s5-ar0", "f8-s5-ar5", "f20-s5-ar0", "f20-s5-ar5"]
    assert "invalid: ar_step must be between 1" in lines[3]
    assert "18 videos" in lines[5]
    assert "s3://nowhere/x: no pipeline on this machine; it adds 4 points" in lines[6]
    assert not (tmp_path / "out").exists()


def test_prompts_are_videos_of_a_point(model: SweptModel, make_pipeline: Any, tmp_path: Path) -> None:
    text = {"condition": "cross_attention", "condition_dim": 5}
    make_pipeline(text_encoder=ToyEncoder(), **text).save_pretrained(str(tmp_path))
    other, long = SweptModel.load(str(tmp_path)), "a blue square " * 100
    grid = GridConfig(checkpoints=("m",), sampling=SamplingParams(num_frames=8), prompts=("a red ring", long), seeds=2)
    specs = specs_of(grid, other)
    assert [(s.sampling.class_label, s.sampling.prompt, s.sampling.seed) for s in specs] == [
        (None, "a red ring", 0),
        (None, "a red ring", 1),
        (None, long, 0),
        (None, long, 1),
    ]
    assert len({spec.point for spec in specs}) == 1
    names = [spec.uri.rpartition("/")[2].partition("-seed")[0] for spec in specs]
    assert names[0] == names[1] == SamplingParams(prompt="a red ring").tags()[0]
    assert len(set(names)) == 2
    assert specs[0].subject == "“a red ring”"
    assert len(specs[2].subject) < 110
    both = specs_of(replace(grid, classes=(1,)), other)
    assert [spec.subject for spec in both[:2]] == ["ring, “a red ring”"] * 2
    assert both[0].uri.rpartition("/")[2].startswith("class-1-prompt-")
    assert len(subjects(grid, other)) == 2
    [point] = sweep_points(grid, [model], "fp32")
    assert "the model takes no text" in str(point.error)
    with pytest.raises(ConfigError, match="prompts must hold at least one value, and none of them twice"):
        build(GridConfig, {"prompts": ["a", "a"]})
    assert build(GridConfig, {"prompts": "a red ring"}).prompts == ("a red ring",)


def test_every_prompt_of_a_grid_is_validated(model: SweptModel) -> None:
    grid = GridConfig(checkpoints=(model.uri,), sampling=SamplingParams(num_frames=8), prompts=("", "a ring"))
    [point] = sweep_points(grid, [model], "fp32")
    assert point.error is not None
    assert "takes no text" in point.error
