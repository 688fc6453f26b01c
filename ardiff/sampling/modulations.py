"""Tables of the model's modulations, which depend on timestep and class but on no latent.

Shapes: S sampling steps, M modulations of a frame (shifts, scales and gates of all blocks).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ardiff.diffusion.ad import inference_timesteps
from ardiff.diffusion.config import DiffusionConfig
from ardiff.dit import DiT
from ardiff.sampling.request import SampleRequest

MAX_IDLE_TABLES = 16
"""Tables that no running request uses, kept for requests to come."""

TableKey = tuple[int, int]
"""Number of sampling steps, and class index."""


class ModulationTables:
    """One table ``(S, M)`` per number of sampling steps and class; requests share them."""

    def __init__(self, model: DiT, diffusion: DiffusionConfig) -> None:
        self.model, self.diffusion = model, diffusion
        self._tables: dict[TableKey, Tensor] = {}

    def __len__(self) -> int:
        return len(self._tables)

    def get(self, num_inference_steps: int, label: int) -> Tensor:
        """The table ``(S, M)``, computed on first use."""
        key = num_inference_steps, label
        if key not in self._tables:
            device = next(self.model.parameters()).device
            timesteps = inference_timesteps(self.diffusion.num_timesteps, num_inference_steps).to(device)
            self._tables[key] = self.model.modulations(timesteps, torch.full_like(timesteps, label))
        return self._tables[key]

    def keys_of(self, requests: Iterable[SampleRequest]) -> set[TableKey]:
        """The tables that requests need."""
        return {(r.params.num_inference_steps, label) for r in requests for label in r.labels(self.model)}

    def num_bytes(self, keys: Iterable[TableKey]) -> int:
        """Memory of tables."""
        dtype = next(self.model.parameters()).dtype
        return sum(num_steps for num_steps, _ in keys) * self.model.modulation_width * dtype.itemsize

    def evict(self, running: Iterable[SampleRequest], spare_bytes: int) -> None:
        """Drops the oldest tables that no running request uses, until few are left and they fit ``spare_bytes``."""
        needed = self.keys_of(running)
        idle = [key for key in self._tables if key not in needed]
        while idle and (len(idle) > MAX_IDLE_TABLES or self.num_bytes(idle) > spare_bytes):
            del self._tables[idle.pop(0)]
