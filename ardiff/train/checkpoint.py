"""Training checkpoints. They are complete, so a resumed run equals an uninterrupted one bit for bit.

A checkpoint is a folder. Every rank writes its shard of the engine's tensors (:mod:`ardiff.train.shards`); then
``state.json`` marks the folder as complete. It holds the step, the position in the data and a fingerprint of everything
that must not change on resumption. In adversarial training a subfolder ``discriminator`` holds the tensors of the
discriminator's engine. No random state is stored, because every draw is keyed by (seed, step).

Any engine on any number of ranks can read a checkpoint, whatever wrote it.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ardiff import distributed
from ardiff.data import storage
from ardiff.errors import CheckpointError
from ardiff.train.engines.base import Engine
from ardiff.train.shards import Shard, ShardReader, local_shard, write_shard

STATE = "state.json"
DISCRIMINATOR = "discriminator"


@dataclass(frozen=True, slots=True)
class TrainState:
    """How far training is."""

    step: int
    """Updates made."""
    samples: int
    """Samples consumed: the position in the data stream."""
    fingerprint: str
    """Identifies the configuration of model, task and data, and the kind of optimizer."""
    hyperparameters: dict[str, Any] = field(default_factory=dict, compare=False)
    """Hyperparameters of the optimisation by setting, see :attr:`ardiff.train.config.TrainConfig.hyperparameters`."""


def save_checkpoint(folder: Path, engine: Engine, state: TrainState, discriminator: Engine | None = None) -> None:
    """Writes this rank's part of a complete checkpoint into ``folder``. Every rank must call it."""
    write_tensors(folder, engine, discriminator)
    if distributed.rank() == 0:
        write_state(str(folder), state)


def load_checkpoint(
    folder: Path,
    engine: Engine,
    fingerprint: str,
    discriminator: Engine | None = None,
    hyperparameters: dict[str, Any] | None = None,
) -> TrainState:
    """Restores ``engine``, and ``discriminator`` if given, and returns the state. Every rank must call it.

    Args:
        hyperparameters: The checkpoint's must equal these; None accepts any.

    Raises:
        CheckpointError: The folder is not a complete checkpoint, or it is of a run with another configuration.
    """
    state = read_state(folder)
    if state.fingerprint != fingerprint:
        raise CheckpointError(
            "The checkpoint in this run's folder was made with another configuration or other data (model, videos or "
            "latents, optimizer or seed). Choose another output folder, or delete this one to start again."
        )
    if hyperparameters is not None and (changes := changed_settings(state.hyperparameters, hyperparameters)):
        raise CheckpointError(
            f"The checkpoint in this run's folder was made with other settings: {changes}. To resume from it with the "
            "new settings, choose another output folder and set resume=CHECKPOINT_FOLDER. resume=none starts again."
        )
    engine.restore(ShardReader(folder))
    if discriminator is not None:
        discriminator.restore(ShardReader(folder / DISCRIMINATOR))
    return state


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The training settings that differ, with both values; empty if none does."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"train.{name} from {old.get(name)} to {new.get(name)}" for name in names)


def write_tensors(folder: Path, engine: Engine, discriminator: Engine | None = None) -> None:
    """Writes this rank's shards of ``engine`` and ``discriminator``. Every rank must call it."""
    write_shards(folder, local_shards(engine, discriminator))


def local_shards(engine: Engine, discriminator: Engine | None = None, copy: bool = False) -> dict[str, Shard]:
    """What this rank writes of ``engine`` and ``discriminator``, by subfolder. Every rank must call it.

    With ``copy`` training may go on before :func:`write_shards`.
    """
    shards = {"": local_shard(engine.tensors(), copy)}
    if discriminator is not None:
        shards[DISCRIMINATOR] = local_shard(discriminator.tensors(), copy)
    return shards


def write_shards(folder: Path, shards: dict[str, Shard]) -> None:
    """Writes this rank's shards. It makes no collective call: a full disk fails this rank only, and no other waits."""
    for subfolder, shard in shards.items():
        write_shard(folder / subfolder, shard)


def write_state(folder: str, state: TrainState) -> None:
    """Marks ``folder`` (local or ``s3://``) as a complete checkpoint. Raises DataError if that fails."""
    storage.write_bytes(storage.join(folder, STATE), json.dumps(asdict(state)).encode())


def read_state(folder: Path) -> TrainState:
    """The state of a checkpoint. Raises CheckpointError if ``folder`` is not a complete one."""
    try:
        return TrainState(**json.loads((folder / STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a complete training checkpoint.") from error
