"""The state of a request between two iterations, with which another engine continues it.

Shapes: B videos, F moving frames, H tensors of a frame's history, L tokens, D latent width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ardiff.errors import DecodeError


@dataclass(frozen=True, slots=True, eq=False)
class SavedState:
    """What an engine cannot compute again of a request, except the frames that are final.

    Cached keys and values are not part of it: they are hundreds of times larger. The engine that continues computes
    those of the clean frames again, each from the same frames at the same positions, so they have the same bits as long
    as the matrix products of a frame do not depend on the frames beside it.
    """

    iteration: int
    """Iterations that the request has made."""
    moving: Tensor
    """Frames that have started and are not final, ``(B, F, 1 + H, L, D)``: latents, then the solver's history."""

    def to_bytes(self) -> bytes:
        """The state in the format of safetensors."""
        return save({"iteration": torch.tensor(self.iteration), "moving": self.moving.cpu().contiguous()})

    @classmethod
    def from_bytes(cls, data: bytes) -> "SavedState":
        """The state of ``to_bytes``. Raises DecodeError if it is damaged; the engine checks that it fits a request."""
        tensors = _load_tensors(data, {"iteration", "moving"})
        if tensors["iteration"].shape or tensors["iteration"].dtype != torch.int64:
            raise DecodeError("The saved state has no number of iterations.")
        return cls(int(tensors["iteration"]), tensors["moving"])


def pack_latents(latents: Sequence[Tensor]) -> bytes:
    """Latents ``(B, n, L, D)`` that follow each other, in the format of safetensors; empty without any."""
    return save({"latents": torch.cat(list(latents), dim=1).cpu()}) if latents else b""


def unpack_latents(data: bytes) -> list[Tensor]:
    """The latents of ``pack_latents``, frame by frame, ``(B, 1, L, D)``. Raises DecodeError if they are damaged."""
    if not data:
        return []
    latents = _load_tensors(data, {"latents"})["latents"]
    if latents.ndim != 4:
        raise DecodeError(f"Latents must have 4 axes, got {latents.ndim}.")
    return list(latents.split(1, dim=1))


def _load_tensors(data: bytes, names: set[str]) -> dict[str, Tensor]:
    """Tensors with these names in the format of safetensors. Raises DecodeError if they are damaged."""
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise DecodeError(f"The tensors are damaged: {error}") from error
    if tensors.keys() != names:
        raise DecodeError(f"Expected the tensors {', '.join(sorted(names))}, got {', '.join(sorted(tensors))}.")
    return tensors
