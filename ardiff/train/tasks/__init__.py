"""Training tasks: a model and its loss. AR-VAE and AR-DiT are two tasks of one loop."""

from ardiff.train.tasks.base import Batch, Task
from ardiff.train.tasks.config import AutoencoderTaskConfig, DiTTaskConfig
from ardiff.train.tasks.dit import DiTTask
from ardiff.train.tasks.vae import AutoencoderTask

__all__ = ["AutoencoderTask", "AutoencoderTaskConfig", "Batch", "DiTTask", "DiTTaskConfig", "Task"]
