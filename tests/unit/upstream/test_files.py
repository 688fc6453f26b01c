"""Untrusted files: every format that torch has written, damaged ones, and pickles that try to execute code."""

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ardiff.errors import CheckpointError
from ardiff.upstream.files import read_checkpoint

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(300)}


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.mark,)


def write(file: Path, content: object, file_format: str) -> None:
    match file_format:
        case "archive":
            torch.save(content, file)
        case "legacy":
            torch.save(content, file, _use_new_zipfile_serialization=False)
        case "pickle":
            file.write_bytes(pickle.dumps(content))
        case "tar":  # before torch 0.1.10
            with tarfile.open(file, "w") as archive:
                for name in ("sys_info", "pickle", "storages", "tensors"):
                    data = pickle.dumps(content)
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))


@pytest.mark.parametrize("file_format", ["archive", "legacy", "safetensors"])
@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: {"state_dict": t, "step": 3}, lambda t: {"model": {"module": t}}]
)
def test_every_format(tmp_path, file_format, wrap):
    file = tmp_path / ("w.safetensors" if file_format == "safetensors" else "w.bin")
    if file_format == "safetensors":
        save_file({f"module.{name}": tensor for name, tensor in TENSORS.items()}, file)
    else:
        write(file, wrap({f"module.{name}": tensor for name, tensor in TENSORS.items()}), file_format)
    read = read_checkpoint(str(file))
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], TENSORS[name]) for name in read)


@pytest.mark.parametrize("file_format", ["archive", "legacy", "pickle", "tar"])
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".safetensors"])
def test_nothing_is_executed(tmp_path, file_format, suffix):
    mark, file = tmp_path / "executed", tmp_path / f"w{suffix}"
    write(file, {"a.weight": torch.ones(2), "b": Payload(mark)}, file_format)
    with pytest.raises(CheckpointError, match=r"refused|Cannot read the weights"):
        read_checkpoint(str(file))
    assert not mark.exists()
    if file_format != "tar":  # the payload works: this is what is not done
        data = io.BytesIO(file.read_bytes())
        pickle.load(data) if file_format == "pickle" else torch.load(data, weights_only=False)  # noqa: S301
        assert mark.exists()


@pytest.mark.parametrize("file_format", ["archive", "legacy"])
def test_the_refusal_says_what_to_do(tmp_path, file_format):
    write(tmp_path / "w.bin", {"a": Payload(tmp_path / "executed")}, file_format)
    with pytest.raises(CheckpointError, match=r"w\.bin holds more than tensors.*refused.*safetensors"):
        read_checkpoint(str(tmp_path / "w.bin"))


@pytest.mark.parametrize("file_format", ["archive", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_truncated(tmp_path, file_format, share):
    file = tmp_path / ("w.safetensors" if file_format == "safetensors" else "w.bin")
    save_file(TENSORS, file) if file_format == "safetensors" else write(file, TENSORS, file_format)
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match=r"Cannot read the weights .*w\."):
        read_checkpoint(str(file))


def test_an_archive_that_lies_about_its_tensors(tmp_path):
    torch.save(TENSORS, tmp_path / "good.bin")
    with zipfile.ZipFile(tmp_path / "good.bin") as good, zipfile.ZipFile(tmp_path / "w.bin", "w") as bad:
        for entry in good.infolist():
            data = good.read(entry)
            bad.writestr(entry.filename, data[:8] if "/data/" in entry.filename else data)
    with pytest.raises(CheckpointError, match="Cannot read the weights"):
        read_checkpoint(str(tmp_path / "w.bin"))


ROUND: dict[str, object] = {}
ROUND["state_dict"] = ROUND


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ROUND, "more than tensors by name: state_dict"),
        ([torch.ones(2)], "no weights by name"),
        ({}, "no weights by name"),
        (torch.ones(2), "no weights by name"),
        ({"a": torch.ones(2), "epoch": 3}, "more than tensors by name: epoch"),
        ({"state_dict": {"a": [1, 2]}}, "more than tensors by name: a"),
        ({3: torch.ones(2)}, "more than tensors by name: 3"),
    ],
)
def test_files_without_weights(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(str(tmp_path / "w.pt"))


def test_no_file(tmp_path):
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        read_checkpoint(str(tmp_path / "w.bin"))
    with pytest.raises(CheckpointError, match="is a folder"):
        read_checkpoint(str(tmp_path))
