import json
from pathlib import Path

import pytest
import torch

from ardiff.errors import CheckpointError
from ardiff.train import shards
from ardiff.train.checkpoint import STATE, TrainState, changed_settings, load_checkpoint, save_checkpoint
from ardiff.train.config import OptimizerConfig, TrainConfig
from ardiff.train.engines.torch_engine import TorchEngine


@pytest.fixture
def engine(make_dit) -> TorchEngine:
    return TorchEngine(make_dit(), OptimizerConfig(), torch.device("cpu"))


def test_round_trip(engine: TorchEngine, make_dit, tmp_path: Path) -> None:
    state = TrainState(7, 112, "abc")
    save_checkpoint(tmp_path / "new" / "folder", engine, state)
    other = TorchEngine(make_dit(seed=5), OptimizerConfig(), torch.device("cpu"))
    assert load_checkpoint(tmp_path / "new" / "folder", other, "abc") == state
    for ours, theirs in zip(engine.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_state_is_written_last(engine: TorchEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that was interrupted while being written is not complete."""

    def fail(tensors: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, engine, TrainState(1, 1, "abc"))
    assert not (tmp_path / STATE).exists()
    with pytest.raises(CheckpointError, match="not a complete training checkpoint"):
        load_checkpoint(tmp_path, engine, "abc")


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", '{"step": 1}', '{"step": 1, "samples": 2, "fingerprint": "", "x": 0}']
)
def test_damaged_state(engine: TorchEngine, tmp_path: Path, text: str) -> None:
    save_checkpoint(tmp_path, engine, TrainState(1, 1, "abc"))
    (tmp_path / STATE).write_text(text)
    with pytest.raises(CheckpointError, match="not a complete training checkpoint"):
        load_checkpoint(tmp_path, engine, "abc")


def test_missing_folder(engine: TorchEngine, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no-such"):
        load_checkpoint(tmp_path / "no-such", engine, "abc")


def test_another_configuration_is_an_error_before_anything_is_loaded(
    engine: TorchEngine, make_dit, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path, engine, TrainState(1, 1, "abc"))
    other = TorchEngine(make_dit(seed=5), OptimizerConfig(), torch.device("cpu"))
    before = {name: weight.detach().clone() for name, weight in other.model.named_parameters()}
    with pytest.raises(CheckpointError, match=r"another configuration .* delete this one"):
        load_checkpoint(tmp_path, other, "xyz")
    for name, weight in other.model.named_parameters():
        assert torch.equal(weight, before[name])


def test_the_state_is_plain_json(engine: TorchEngine, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, engine, TrainState(3, 48, "abc"))
    state = {"step": 3, "samples": 48, "fingerprint": "abc", "hyperparameters": {}}
    assert json.loads((tmp_path / STATE).read_text()) == state


def test_other_hyperparameters_are_an_error_unless_any_are_accepted(engine: TorchEngine, tmp_path: Path) -> None:
    before, after = (TrainConfig(optimizer=OptimizerConfig(lr=lr)).hyperparameters for lr in (2e-4, 1e-5))
    save_checkpoint(tmp_path, engine, TrainState(3, 48, "abc", before))
    assert load_checkpoint(tmp_path, engine, "abc", hyperparameters=before).hyperparameters == before
    with pytest.raises(CheckpointError, match=r"other settings: train\.optimizer\.lr from 0\.0002 to 1e-05\. "):
        load_checkpoint(tmp_path, engine, "abc", hyperparameters=after)
    state = load_checkpoint(tmp_path, engine, "abc")
    assert changed_settings(state.hyperparameters, after) == "train.optimizer.lr from 0.0002 to 1e-05"
    assert changed_settings(after, after) == ""
