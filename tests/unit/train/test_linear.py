"""ardiff.train.engines.linear: the choice is made once for a machine, and kept."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from ardiff import onednn
from ardiff.train.config import TrainConfig
from ardiff.train.engines.factory import make_engine
from ardiff.train.engines.linear import fastest_linear

pytestmark = pytest.mark.skipif(not onednn.available(), reason="this torch is built without oneDNN")


@pytest.fixture
def choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that keeps the choices, in a cache of the test's own."""
    monkeypatch.setenv("ARDIFF_CACHE", str(tmp_path))
    return tmp_path / "linear.json"


def test_the_choice_is_kept(choices: Path) -> None:
    chosen = fastest_linear()
    [(machine, kept)] = json.loads(choices.read_text()).items()
    assert kept == chosen
    assert f"torch {torch.__version__}" in machine
    other = {"torch": "onednn", "onednn": "torch"}[chosen]
    choices.write_text(json.dumps({machine: other}))
    assert fastest_linear() == other


@pytest.mark.parametrize("content", ["", "[]", '{"another machine": "onednn"}', '{"machine": 1}'])
def test_other_machines_and_damaged_files_are_measured_again(choices: Path, content: str) -> None:
    choices.write_text(content)
    assert fastest_linear() in json.loads(choices.read_text()).values()


def test_a_cache_that_cannot_be_written_is_no_error(choices: Path) -> None:
    choices.mkdir()
    assert fastest_linear() in ("torch", "onednn")


@pytest.mark.parametrize("choice", ["torch", "onednn"])
def test_auto_uses_the_choice(choices: Path, choice: str) -> None:
    fastest_linear()
    [machine] = json.loads(choices.read_text())
    choices.write_text(json.dumps({machine: choice}))
    model = nn.Linear(4, 4)
    make_engine(model, TrainConfig(linear="auto"), torch.device("cpu"))
    assert ("forward" in vars(model)) == (choice == "onednn")
