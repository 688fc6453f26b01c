"""Tables of the model's modulations, which depend on timestep and class but on no latent.

Shapes: R timesteps that a model is shown, M modulations of a frame (shifts, scales and gates of all blocks),
N packed frames.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.solver_names import TimestepSpacing
from ardiff.diffusion.solvers import model_timesteps
from ardiff.dit import DiT
from ardiff.sampling.request import SampleRequest
from ardiff.sampling.tables import SharedTables
from ardiff.tensors import to_device


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

    def rows(self, frames: Sequence[tuple[TableKey, int]]) -> Tensor:
        """The modulations ``(N, M)`` of packed frames, from the table and the row of each."""
        places = dict[TableKey, list[int]]()
        for place, (key, _) in enumerate(frames):
            places.setdefault(key, []).append(place)
        order = [place for of_table in places.values() for place in of_table]
        index = torch.tensor([frames[place][1] for place in order])
        rows = to_device(index, next(self.model.parameters()).device).split([len(p) for p in places.values()])
        gathered = [self.get(key)[of_table] for key, of_table in zip(places, rows, strict=True)]
        if len(gathered) == 1:
            return gathered[0]
        return torch.cat(gathered)[to_device(torch.tensor(order).argsort(), rows[0].device)]

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
