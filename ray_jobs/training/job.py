"""The description of a training run that the driver sends to every worker."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ardiff.data import storage
from ardiff.data.streams import Stream
from ardiff.train.config import TrainConfig
from ardiff.train.tasks import Task


@dataclass(frozen=True, slots=True)
class TrainJob:
    """One training run, whatever the task. It is pickled, so it holds descriptions instead of models."""

    name: str
    """Shown beside the progress bar."""
    folder: str
    """The run's folder, local or ``s3://``: logs, samples and checkpoints."""
    fingerprint: str
    """Identifies everything that must not change when the run resumes."""
    config: TrainConfig
    stream: Stream
    make_task: Callable[[], Task]
    """Builds the task with initial weights drawn from the seed."""
    record: Callable[[], None]
    """Writes configuration and versions to the folder. Called once training knows that the folder holds no other
    run."""
    description: dict[str, Any]
    """Describes the model for :func:`ardiff.train.export.write_trained`; stored in every checkpoint."""
    result: str
    """Folder of the trained model, written at the end."""
    resume: str = "auto"
    """``auto``, ``latest``, ``none`` or the folder of a checkpoint."""

    @property
    def checkpoints(self) -> str:
        """Folder of Ray Train, with the latest checkpoints."""
        return storage.join(self.folder, "ray")

    @property
    def history_file(self) -> str:
        """JSON file with the logged values: a list of ``[step, value]`` by name."""
        return storage.join(self.folder, "history.json")

    @property
    def best(self) -> str:
        """Folder of the best checkpoint."""
        return storage.join(self.folder, "best")

    @property
    def best_file(self) -> str:
        """JSON file that names the best checkpoint, its step and its loss."""
        return storage.join(self.best, "best.json")


def loss_note(history: dict[str, list[list[float]]]) -> str:
    """The last logged loss, for the record of a stage."""
    step, loss = history["loss"][-1]
    return f"{int(step)} steps, loss {loss:.4f}"
