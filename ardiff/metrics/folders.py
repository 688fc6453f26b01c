"""Feature networks of the package transformers: from a folder, a bucket or a hub repository to a state dict.

A folder holds ``config.json`` and safetensors; nothing is unpickled, and no code of a repository runs. The
configuration says the size of the network, so it travels in the state dict: its JSON is the entry ``config.json``.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ardiff import hub
from ardiff.data import storage
from ardiff.errors import ArdiffError, CheckpointError
from ardiff.metrics.registry import State, networks
from ardiff.model_folders import CONFIG, Kind, find_folder

FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".tar", ".ckpt", ".bin")
"""A path with such an end is a file, also where it does not exist."""
FOLDER = Kind("feature network", f"{CONFIG} and safetensors weights")


def is_folder(uri: str) -> bool:
    """Whether ``uri`` is a model folder, or has the form of a hub repository's name and is no file."""
    if storage.exists(storage.join(uri, CONFIG)):
        return True
    if storage.is_remote(uri) or uri.endswith(FILE_SUFFIXES):
        return False
    return hub.is_repo_id(uri) and not storage.exists(uri)


def read_folder(uri: str) -> State:
    """The tensors and the configuration of a model folder, with the names that :func:`make_model` gives them.

    Raises:
        CheckpointError: There is no such folder, it is damaged, or holds none of the networks.
    """
    folder = find_folder(uri, FOLDER)
    files = sorted(folder.glob("*.safetensors"))
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = {key: value for file in files for key, value in load_file(file).items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"The feature network {uri} cannot be read ({error}): copy its files again.") from error
    kind = config.get("model_type") if isinstance(config, Mapping) else None
    build = next((network.build for network in networks().values() if kind in network.kinds), None)
    if build is None:
        kinds = ", ".join(kind for network in networks().values() for kind in network.kinds)
        raise CheckpointError(f"{uri} holds a model of the kind {kind}; the kinds of feature networks are {kinds}.")
    if not tensors:
        raise CheckpointError(f"The feature network {uri} holds no safetensors: convert its weights to them first.")
    return pack(build(config=config, tensors=tensors).state_dict(), config)


def pack(tensors: State, config: Mapping[str, Any]) -> State:
    """A state dict with the configuration of its model."""
    return {**tensors, CONFIG: torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)}


def config_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration in a state dict."""
    config: dict[str, Any] = json.loads(bytes(state[CONFIG].tolist()))
    return config


def make_model(
    class_name: str, config_class: str, config: Mapping[str, Any] | None, tensors: State | None = None, **changes: Any
) -> nn.Module:
    """A model of the package transformers.

    Args:
        class_name: The model's class.
        config_class: The class of its configuration.
        config: Its configuration; None for that of the class.
        tensors: Its weights, with the names of any of its published forms; None for random ones.
        changes: Replace fields of the configuration.

    Raises:
        ArdiffError: The package transformers is missing, the configuration is invalid, or weights are missing.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ArdiffError(
            f"This feature network needs the package {error.name}, which is not installed: pip install 'ardiff[text]'."
        ) from error
    kept = {key: value for key, value in (config or {}).items() if key not in ("auto_map", "dtype", "torch_dtype")}
    model_class = getattr(transformers, class_name)
    try:
        settings = getattr(transformers, config_class)(**{**kept, **changes})
        if tensors is None:
            model: nn.Module = model_class(settings)
            return model
        with _quiet(transformers):
            model, report = model_class.from_pretrained(
                None, config=settings, state_dict=tensors, dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:  # whatever damaged files raise
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"The {class_name} cannot be read ({line}): check {CONFIG} and the weights beside it."
        ) from error
    if report["missing_keys"] or report["mismatched_keys"]:
        name = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))[0]
        raise CheckpointError(f"The weights of the {class_name} lack {name}, or it has another shape.")
    return model


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Hides the package's progress bar and its list of the tensors that are not used."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
