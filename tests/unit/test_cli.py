"""The command: help, dry runs, exit codes and one-sentence errors. No job is started."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from ardiff.cli import COMMANDS, main
from ardiff.config import load_config, section_classes, to_dict


def config_class(command: str) -> type[Any]:
    module, name, _ = COMMANDS[command]
    return getattr(importlib.import_module(module), name)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ARDIFF_DEBUG", "")  # so that what --debug sets is undone
    monkeypatch.delenv("ARDIFF_DEBUG")


def exit_code(arguments: list[str]) -> int:
    """What the shell sees, whether the command returns or argparse exits."""
    try:
        return main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize("arguments", [[], ["trian-vae"], ["--no-such"]])
def test_a_call_without_a_verb_is_wrong(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("usage: ardiff")
    assert "Traceback" not in captured.err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for command, (_, _, summary) in COMMANDS.items():
        assert f"{command} {summary}" in text
    assert " doctor " in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_lists_every_setting(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: ardiff {command}")

    def check(cls: Any, prefix: str) -> None:
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if classes := section_classes(hints[field.name]):
                assert f"  {prefix}{field.name}: " in text
                for section in classes:
                    check(section, f"{prefix}{field.name}.")
            elif prefix:
                assert f"    {prefix}{field.name}: " in text
            elif "from_input" not in field.metadata:
                assert f"--{field.name.replace('_', '-')}" in text

    check(config_class(command), "")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_dry_run_prints_what_loads_back_equal(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    named = {"estimate": "precision", "serve": "checkpoint", "lint-serve": "file", "api-key": "name"}
    name = {**named, "import-upstream": "out", "weights": "cache"}.get(command, "output")
    value = "fp32" if command == "estimate" else "elsewhere"
    assert main([command, "--dry-run", f"--{name}", value]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    (tmp_path / "resolved.yaml").write_text(captured.out)
    config = load_config(config_class(command), [tmp_path / "resolved.yaml"])
    assert getattr(config, name) == value
    assert to_dict(config) == yaml.safe_load(captured.out)
    assert main([command, "--dry-run", "--config", "resolved.yaml"]) == 0
    assert capsys.readouterr().out == captured.out
    assert [p.name for p in tmp_path.iterdir()] == ["resolved.yaml"]  # nothing else was written


def test_settings_come_from_file_then_options_then_overrides(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "a.yaml").write_text("num_videos: 3\nseed: 1\nfps: 1e1\ncodec: vp9\n")
    (tmp_path / "b.yaml").write_text("seed: 2\n")
    arguments = ["generate", "--dry-run", "--config", "a.yaml", "--config", "b.yaml", "--num-videos", "4", "crf=9"]
    assert main([*arguments, "--ar-step", "7", "ar_step=8"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    given = {key: config[key] for key in ("num_videos", "seed", "fps", "codec", "crf", "ar_step")}
    assert given == {"num_videos": 4, "seed": 2, "fps": 10.0, "codec": "vp9", "crf": 9, "ar_step": 8}


def test_the_quickstart_reads_its_shipped_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart", "--dry-run", "train_dit.train.seed=5"]) == 0
    plain = yaml.safe_load(capsys.readouterr().out)
    assert main(["quickstart", "--dry-run", "--fast"]) == 0
    fast = yaml.safe_load(capsys.readouterr().out)
    assert plain["train_dit"]["train"]["seed"] == 5
    assert (plain["fast"], fast["fast"]) == (False, True)
    assert fast["train_dit"]["train"]["num_steps"] < plain["train_dit"]["train"]["num_steps"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train-dit", "train.optimzer.lr=1"], "did you mean 'train.optimizer'?"),
        (["train-dit", "train.optimizer.lr=fast"], "'train.optimizer.lr' must be of type float, not 'fast'"),
        (["train-dit", "dit.num_heads=0"], "dit: num_frames"),
        (["train-vae", "vae.patch_size=7"], "vae: resolution 256 must be a multiple of patch_size 7"),
        (["generate", "num_videos"], "'num_videos' is not an override"),
        (["generate", "--num-videos", "many"], "'num_videos' must be of type int"),
        (["generate", "--mode", "magic"], "'mode' must be one of"),
        (["generate", "--config", "no.yaml"], "Cannot read the configuration no.yaml"),
        (["evaluate", "vae=runs/vae/model"], "Unknown configuration key 'vae'"),
        (["evaluate-quick", "metrics=psnr"], "Unknown configuration key 'metrics'"),
        (["sweep", "quick.drift=true"], "Unknown configuration key 'quick.drift'"),
        (["quickstart", "samples.ar_steps=[0, 99]"], "ar_step must be between 0 and num_inference_steps (20)"),
    ],
)
def test_bad_settings_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*arguments, "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ardiff: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not list(tmp_path.iterdir())


def test_unknown_options_are_wrong_calls(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["generate", "--no-such", "3"]) == 2
    assert "unknown option --no-such" in capsys.readouterr().err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "generate", "num_videos=x", "--dry-run"]) == 2
    captured = capsys.readouterr().err
    assert "Traceback (most recent call last)" in captured
    assert captured.splitlines()[-1].startswith("ardiff: 'num_videos' must be of type int")


def test_a_job_that_cannot_work_exits_with_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Refused before Ray is started, and before anything is written."""
    assert main(["generate", "--pipeline", "no-model"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "ardiff: There is no trained model in no-model: it should hold config.json.\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        ([], 2, "give --checkpoint URI"),
        (["--checkpoint", "none"], 1, "There is no trained model in"),
        (["--checkpoint", "x", "--host", "0.0.0.0"], 2, "set service.keys"),
        (["--checkpoint", "x", "service.lease_seconds=1"], 2, "at least twice heartbeat_seconds"),
        (["--checkpoint", "x", "--min-replicas", "2"], 2, "max_replicas"),
    ],
)
def test_what_cannot_be_served_is_refused_before_ray_is_started(
    arguments: list[str], code: int, reason: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["serve", *arguments]) == code
    captured = capsys.readouterr()
    assert reason in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_interruption_says_how_to_resume(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(config: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ray_jobs.generate.run", interrupted)
    assert main(["generate"]) == 130
    assert "The same command resumes" in capsys.readouterr().err


def test_a_job_gets_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("ray_jobs.prepare.run", seen.append)
    assert main(["prepare", "--source", "videos", "synthetic.seed=3"]) == 0
    assert seen == [load_config(config_class("prepare"), None, ["source=videos", "synthetic.seed=3"])]


def test_an_error_that_is_no_users_fault_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: Any) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr("ray_jobs.prepare.run", broken)
    with pytest.raises(AssertionError, match="a bug"):
        main(["prepare"])


def test_lists_second_names_and_further_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--dry-run", "--fake", "a,b", "--metrics", "fvd, kvd", "--frames", "128"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["fake"], config["metrics"], config["num_frames"]) == (["a", "b"], ["fvd", "kvd"], 128)
    assert main(["compare", "--dry-run", "runs/a", "runs/b, c", "output=t.txt"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["runs"], config["output"]) == (["runs/a", "runs/b, c"], "t.txt")
