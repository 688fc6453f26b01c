"""Training tasks: a model and its loss. AR-VAE, AR-DiT and its students are tasks of one loop."""

from ardiff.train.tasks.base import Batch, Task
from ardiff.train.tasks.config import AutoencoderTaskConfig, DistillTaskConfig, DiTTaskConfig
from ardiff.train.tasks.distill import DistillTask
from ardiff.train.tasks.dit import DiTTask
from ardiff.train.tasks.vae import AutoencoderTask

__all__ = [
    "AutoencoderTask",
    "AutoencoderTaskConfig",
    "Batch",
    "DiTTask",
    "DiTTaskConfig",
    "DistillTask",
    "DistillTaskConfig",
    "Task",
]
