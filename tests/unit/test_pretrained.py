"""Model folders: what is written loads, and errors name what does not fit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ardiff.errors import CheckpointError
from ardiff.hub import is_repo_id
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.pretrained import load_autoencoder, save_autoencoder


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_autoencoder_round_trip(make_vae, tmp_path: Path) -> None:
    model = make_vae()
    save_autoencoder(str(tmp_path / "vae"), model)
    assert sorted(p.name for p in (tmp_path / "vae").iterdir()) == ["config.json", "vae.safetensors"]
    loaded = load_autoencoder(str(tmp_path / "vae"))
    assert loaded.config == model.config
    assert not loaded.training
    for (name, saved), parameter in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(saved, parameter), name


def test_given_weights_are_saved_in_place_of_the_models_own(make_vae, tmp_path: Path) -> None:
    model, other = make_vae(), make_vae(seed=7)
    save_autoencoder(str(tmp_path), model, dict(other.named_parameters()))
    for loaded, saved in zip(load_autoencoder(str(tmp_path)).parameters(), other.parameters(), strict=True):
        assert torch.equal(loaded, saved)


def test_loading_leaves_the_saved_model_in_its_mode(make_vae, tmp_path: Path) -> None:
    model = make_vae().train()
    save_autoencoder(str(tmp_path), model)
    assert model.training


def test_the_configuration_is_written_last(make_vae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without it was not written completely, and does not load."""
    monkeypatch.setattr("ardiff.data.storage.write_bytes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_autoencoder(str(tmp_path / "vae"), make_vae())
    assert (tmp_path / "vae" / "vae.safetensors").exists()
    with pytest.raises(CheckpointError, match="no trained model"):
        load_autoencoder(str(tmp_path / "vae"))


def test_missing_folder(tmp_path: Path) -> None:
    for load in (load_autoencoder, ARDiffusionPipeline.from_pretrained):
        with pytest.raises(CheckpointError, match=r"no trained model in .*nothing: it should hold config\.json"):
            load(str(tmp_path / "nothing"))


@pytest.mark.parametrize("text", ["", "{", "not json", "[1]", "3"])
def test_an_invalid_configuration(make_vae, tmp_path: Path, text: str) -> None:
    save_autoencoder(str(tmp_path), make_vae())
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json (is not valid JSON|holds no configuration)"):
        load_autoencoder(str(tmp_path))


def test_another_kind_or_format_is_refused(make_vae, tmp_path: Path) -> None:
    save_autoencoder(str(tmp_path), make_vae())
    with pytest.raises(CheckpointError, match=r"holds a ar-vae of format 1, not a ar-diffusion-pipeline of format 1"):
        ARDiffusionPipeline.from_pretrained(str(tmp_path))
    edit(tmp_path, format=2)
    with pytest.raises(CheckpointError, match="of format 2, not a ar-vae of format 1"):
        load_autoencoder(str(tmp_path))


def test_weights_of_other_sizes_name_the_tensor(make_vae, tmp_path: Path) -> None:
    model = make_vae()
    save_autoencoder(str(tmp_path), model)
    edit(tmp_path, vae={**json.loads((tmp_path / "config.json").read_text())["vae"], "num_tokens": 3})
    with pytest.raises(
        CheckpointError, match=r"decoder\.token_positions is \(2, 16\) in the file, \(3, 16\) in the model"
    ):
        load_autoencoder(str(tmp_path))


def test_missing_and_surplus_tensors_are_named(make_vae, tmp_path: Path) -> None:
    save_autoencoder(str(tmp_path), make_vae())
    file = tmp_path / "vae.safetensors"
    weights = load_file(file)
    save_file({n: t for n, t in weights.items() if n != "encoder.norm.bias"}, file)
    with pytest.raises(CheckpointError, match=r"encoder\.norm\.bias is missing in the file"):
        load_autoencoder(str(tmp_path))
    save_file({**weights, "discriminator.weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"discriminator\.weight .* not a parameter of the model"):
        load_autoencoder(str(tmp_path))


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_damaged_weights_name_the_file(make_vae, tmp_path: Path, damage: str) -> None:
    save_autoencoder(str(tmp_path), make_vae())
    file = tmp_path / "vae.safetensors"
    match damage:
        case "missing":
            file.unlink()
        case "truncated":
            file.write_bytes(file.read_bytes()[:-10])
        case "empty":
            file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"Cannot read the weights .*vae\.safetensors"):
        load_autoencoder(str(tmp_path))


def test_keys_of_another_version_are_named(make_vae, tmp_path: Path) -> None:
    save_autoencoder(str(tmp_path), make_vae())
    edit(tmp_path, vae={"width": 16, "hidden_size": 3})
    with pytest.raises(CheckpointError, match=r"another version of ardiff: Unknown configuration key 'hidden_size'"):
        load_autoencoder(str(tmp_path))
    edit(tmp_path, vae={"width": 15})
    with pytest.raises(CheckpointError, match=r"another version of ardiff: .*width 15"):
        load_autoencoder(str(tmp_path))


@pytest.mark.parametrize("name", ["runs/my--model", "runs/x.", "runs/model.git", "runs/a..b", "a/b/c", "folder"])
def test_names_that_a_hub_cannot_have_are_folders(name: str) -> None:
    assert not is_repo_id(name)
    with pytest.raises(CheckpointError):
        ARDiffusionPipeline.from_pretrained(name)
