"""Training checkpoints: complete, so that training goes on exactly where it was.

A checkpoint is a folder: the engine's files (weights, average, optimizer) and ``state.json``, written last, with the
step, the position in the data and a fingerprint of everything that must not change in between. In adversarial training
the critic's engine has a folder ``critic`` in it. There is no random state to keep: every draw is keyed by
(seed, step).
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ardiff.errors import CheckpointError
from ardiff.train.engine import Engine

STATE = "state.json"
CRITIC = "critic"


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where training is."""

    step: int
    """Updates made."""
    samples: int
    """Samples consumed: the position in the data stream."""
    fingerprint: str
    """Names the configuration of model, task, data and optimizer."""


def save_checkpoint(folder: Path, engine: Engine, state: TrainState, critic: Engine | None = None) -> None:
    """Writes a complete checkpoint into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    engine.save(folder)
    if critic is not None:
        (folder / CRITIC).mkdir(exist_ok=True)
        critic.save(folder / CRITIC)
    (folder / STATE).write_text(json.dumps(asdict(state)))


def load_checkpoint(folder: Path, engine: Engine, fingerprint: str, critic: Engine | None = None) -> TrainState:
    """Restores ``engine``, and ``critic`` if there is one, and says where training is.

    Raises:
        CheckpointError: The folder is not a complete checkpoint, or one of a run with another configuration.
    """
    try:
        state = TrainState(**json.loads((folder / STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a complete training checkpoint.") from error
    if state.fingerprint != fingerprint:
        raise CheckpointError(
            "The checkpoint in this run's folder was made with another configuration (model, data, optimizer or seed): "
            "give another output folder, or delete this one to start again."
        )
    engine.load(folder)
    if critic is not None:
        critic.load(folder / CRITIC)
    return state
