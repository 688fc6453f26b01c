"""Tables of the model's modulations, which depend on timestep and class but on no latent.

Shapes: R timesteps that a model is shown, M modulations of a frame (shifts, scales and gates of all blocks).
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.solver_names import TimestepSpacing
from ardiff.diffusion.solvers import model_timesteps
from ardiff.dit import DiT
from ardiff.sampling.request import SampleRequest
from ardiff.sampling.tables import SharedTables


class TableKey(NamedTuple):
    """What a table depends on."""

    num_inference_steps: int
    timestep_spacing: TimestepSpacing
    label: int
    """Class index as the model takes it."""


class ModulationTables(SharedTables[TableKey, Tensor]):
    """One table ``(R, M)`` per template of timesteps and class; requests share them."""

    def __init__(self, model: DiT, diffusion: DiffusionConfig) -> None:
        super().__init__()
        self.model, self.diffusion = model, diffusion

    def timesteps(self, key: TableKey) -> Tensor:
        """The timestep of each row, int64 ``(R,)``; the last one is that of clean frames."""
        return model_timesteps(self.diffusion, key.num_inference_steps, key.timestep_spacing)

    def get(self, key: TableKey) -> Tensor:
        """The table ``(R, M)``, computed on first use."""
        if key not in self._tables:
            timesteps = self.timesteps(key).to(next(self.model.parameters()).device)
            self._tables[key] = self.model.modulations(timesteps, torch.full_like(timesteps, key.label))
        return self._tables[key]

    def key(self, request: SampleRequest, label: int) -> TableKey:
        """The table that a request needs for sequences of one class; condition tokens do not change it."""
        params = request.params
        label = 0 if self.model.config.condition == "tokens" else label
        return TableKey(params.resolved_num_inference_steps, params.resolved_timestep_spacing, label)

    def keys_of(self, requests: Iterable[SampleRequest]) -> set[TableKey]:
        """The tables that requests need."""
        return {self.key(request, label) for request in requests for label in request.distinct_labels(self.model)}

    def num_bytes(self, keys: Iterable[TableKey]) -> int:
        """Memory of tables."""
        dtype = next(self.model.parameters()).dtype
        return sum(len(self.timesteps(key)) for key in keys) * self.model.modulation_width * dtype.itemsize
