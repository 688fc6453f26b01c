"""The files around the code: continuous integration and pre-commit run what the Makefile runs."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()


def recipe(target: str) -> list[str]:
    """The commands of a target."""
    match = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert match is not None, target
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in match[1].splitlines()]


def test_pre_commit_runs_the_steps_of_lint_and_types() -> None:
    config = ROOT / ".pre-commit-config.yaml"
    subprocess.run([Path(sys.executable).with_name("pre-commit"), "validate-config", config], check=True)
    [repository] = yaml.safe_load(config.read_text())["repos"]
    assert repository["repo"] == "local"
    entries = [hook["entry"].replace(" --force-exclude", "") for hook in repository["hooks"]]
    steps = [step.removesuffix(" .").replace(" --check", "") for step in recipe("lint") + recipe("types")]
    assert entries == steps


@pytest.mark.parametrize("file", [".ci/run", ".github/workflows/test.yml"])
def test_continuous_integration_calls_targets_of_the_makefile(file: str) -> None:
    text = (ROOT / file).read_text()
    if file.endswith(".yml"):
        workflow: dict[Any, Any] = yaml.safe_load(text)
        assert workflow[True].keys() == {"push", "pull_request", "schedule"}  # YAML reads the key `on` as true
        commands = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
        targets = set(re.findall(r"'([a-z-]+)'", commands[0])) - {"schedule"}
        assert targets == {"test", "test-slow"}
    else:
        targets = set(re.findall(r"^make ([a-z-]+)$", text, re.MULTILINE))
        assert targets == {"test"}
    assert all(recipe(target) for target in targets)
