"""Training checkpoints: complete, so that training goes on exactly where it was, and bound to no number of workers.

A checkpoint is a folder. Each worker writes its share of the engine's tensors as safetensors, whole tensors in float32
under the names of the model: ``model`` (raw weights), ``ema`` (their average), ``optimizer``, one file a worker each.
Whatever engine and number of workers wrote it, any can read it. ``state.json``, written last, holds the step, the
position in the data and a fingerprint of everything that must not change in between. In adversarial training the
critic's engine has a folder ``critic`` in it. There is no random state to keep: every draw is keyed by (seed, step).
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ardiff import distributed
from ardiff.data import storage
from ardiff.errors import CheckpointError
from ardiff.train.engine import Engine

STATE = "state.json"
CRITIC = "critic"
PARTS = ("model", "ema", "optimizer")


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where training is."""

    step: int
    """Updates made."""
    samples: int
    """Samples consumed: the position in the data stream."""
    fingerprint: str
    """Names the configuration of model, task and data, and the kind of optimizer."""
    hyperparameters: dict[str, Any] = field(default_factory=dict, compare=False)
    """The numbers of the optimisation, by the names of their settings."""


def save_checkpoint(folder: Path, engine: Engine, state: TrainState, critic: Engine | None = None) -> None:
    """Writes this worker's share of a complete checkpoint into ``folder``; every worker has to call it."""
    write_shards(folder, engine, critic)
    if distributed.rank() == 0:
        write_state(str(folder), state)


def load_checkpoint(
    folder: Path,
    engine: Engine,
    fingerprint: str,
    critic: Engine | None = None,
    hyperparameters: dict[str, Any] | None = None,
) -> TrainState:
    """Restores ``engine``, and ``critic`` if there is one, and says where training is; every worker has to call it.

    Args:
        hyperparameters: What those of the checkpoint must be; any if not given.

    Raises:
        CheckpointError: The folder is not a complete checkpoint, or one of a run with another configuration.
    """
    state = read_state(folder)
    if state.fingerprint != fingerprint:
        raise CheckpointError(
            "The checkpoint in this run's folder was made with another configuration or other data (model, videos or "
            "latents, optimizer or seed): give another output folder, or delete this one to start again."
        )
    if hyperparameters is not None and (changes := changed_settings(state.hyperparameters, hyperparameters)):
        raise CheckpointError(
            f"The checkpoint in this run's folder was made with other settings: {changes}. To go on from it with "
            "these, give another output folder and its place as resume=PLACE; resume=none starts again."
        )
    engine.restore(Shards(folder))
    if critic is not None:
        critic.restore(Shards(folder / CRITIC))
    return state


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Names the settings of training that differ, with both values; empty if none does."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"train.{name} from {old.get(name)} to {new.get(name)}" for name in names)


def write_state(place: str, state: TrainState) -> None:
    """Marks the folder ``place`` as a complete checkpoint. Raises DataError if it cannot be written."""
    storage.write_bytes(storage.join(place, STATE), json.dumps(asdict(state)).encode())


def read_state(folder: Path) -> TrainState:
    """Where training was when the checkpoint was made. Raises CheckpointError if ``folder`` is not a complete one."""
    try:
        return TrainState(**json.loads((folder / STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a complete training checkpoint.") from error


def write_shards(folder: Path, engine: Engine, critic: Engine | None = None) -> None:
    """Writes this worker's share of the tensors of ``engine``, and ``critic``; every worker has to call it."""
    shares = {folder: _share(engine)}
    if critic is not None:
        shares[folder / CRITIC] = _share(critic)
    # All that takes the other workers is done: a full disk is this worker's affair.
    for place, parts in shares.items():
        place.mkdir(parents=True, exist_ok=True)
        for part, tensors in parts.items():
            save_file(tensors, place / f"{part}-{distributed.rank()}-of-{distributed.size()}.safetensors")


def _share(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """The tensors that this worker writes, by part and name."""
    share: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for part, name, tensor in engine.tensors():
        if _turn(name, distributed.size()) == distributed.rank():
            share[part][name] = tensor.detach().cpu().contiguous()
    return share


def _turn(name: str, size: int) -> int:
    """The worker that writes a parameter's tensors: spread by a sum over the name's characters."""
    return sum(name.rpartition("/")[2].encode()) % size


class Shards:
    """Reads the tensors of a checkpoint one by one, from the files of however many workers."""

    def __init__(self, folder: Path) -> None:
        self.files = {part: dict(self._names(folder, part)) for part in PARTS}

    @staticmethod
    def _names(folder: Path, part: str) -> Iterator[tuple[str, Path]]:
        files = sorted(folder.glob(f"{part}-*-of-*.safetensors"))
        matches = [re.fullmatch(rf"{part}-(\d+)-of-(\d+)\.safetensors", file.name) for file in files]
        found = {(int(m[1]), int(m[2])) for m in matches if m}
        sizes = {size for _, size in found}
        if len(sizes) != 1 or len(found) != max(sizes):
            raise CheckpointError(f"{folder} is not a complete training checkpoint: files of '{part}' are missing.")
        for file in files:
            try:
                with safe_open(file, framework="pt") as tensors:
                    yield from ((name, file) for name in tensors.keys())  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"Cannot read the checkpoint's file {file}: {error}") from error

    def names(self, part: str) -> list[str]:
        """The names of all tensors of a part."""
        return list(self.files[part])

    def read(self, part: str, name: str) -> Tensor:
        """One tensor, on the CPU. Raises CheckpointError if there is none of that name."""
        if name not in self.files[part]:
            raise CheckpointError(f"The checkpoint has no '{name}' in its '{part}': it is of another model.")
        with safe_open(self.files[part][name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    def fill(self, part: str, name: str, target: Tensor) -> None:
        """Copies one tensor over ``target``. Raises CheckpointError if there is none, or one of another shape."""
        tensor = self.read(part, name)
        if tensor.shape != target.shape:
            raise CheckpointError(
                f"The checkpoint's '{name}' is {tuple(tensor.shape)}, the model's is {tuple(target.shape)}: it is of "
                "another model."
            )
        with torch.no_grad():
            target.copy_(tensor)
