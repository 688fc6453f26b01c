"""Engines: what turns a loss into an update. The loop knows this interface only."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ardiff.train.ema import EMA
from ardiff.train.optim import OptimizerConfig, build_optimizers


class Engine(Protocol):
    """Owns a model, its optimizer state and its average."""

    model: nn.Module
    device: torch.device

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which the forward pass runs: mixed precision, if any."""

    def backward(self, loss: Tensor) -> None:
        """Accumulates gradients of ``loss``."""

    def step(self, step: int, lr_factor: float) -> float:
        """Clips, updates the weights and the average, clears the gradients; returns the norm before clipping.

        Leaves everything as it was if that norm is not finite.
        """

    def save(self, folder: Path) -> None:
        """Writes weights, average and optimizer state into ``folder``."""

    def load(self, folder: Path) -> None:
        """Restores what :meth:`save` wrote."""

    def averaged_weights(self) -> dict[str, Tensor]:
        """The averaged parameters by name, float32, on the CPU."""


class TorchEngine:
    """Plain PyTorch in one process."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerConfig,
        device: torch.device,
        precision: str = "fp32",
        max_grad_norm: float = 1.0,
        ema_decay: float = 0.995,
    ) -> None:
        self.model = model.to(device)
        self.device = device
        self.precision = precision
        self.max_grad_norm = max_grad_norm
        self.optimizers = build_optimizers(model, optimizer)
        self.base_lrs = [group["lr"] for o in self.optimizers for group in o.param_groups]
        self.ema = EMA(model, ema_decay)

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, step: int, lr_factor: float) -> float:
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm))
        if norm == norm and norm != float("inf"):
            groups = [group for o in self.optimizers for group in o.param_groups]
            for group, lr in zip(groups, self.base_lrs, strict=True):
                group["lr"] = lr * lr_factor
            for optimizer in self.optimizers:
                optimizer.step()
            self.ema.update(self.model, step)
        self.model.zero_grad(set_to_none=True)
        return norm

    def save(self, folder: Path) -> None:
        save_file({n: p.detach().contiguous() for n, p in self.model.named_parameters()}, folder / "model.safetensors")
        save_file(self.ema.state_dict(), folder / "ema.safetensors")
        torch.save([o.state_dict() for o in self.optimizers], folder / "optimizer.pt")

    def load(self, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors", device=str(self.device))
        self.model.load_state_dict(weights, strict=True)
        self.ema.load_state_dict(load_file(folder / "ema.safetensors", device=str(self.device)))
        states = torch.load(folder / "optimizer.pt", map_location=self.device, weights_only=True)
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)

    def averaged_weights(self) -> dict[str, Tensor]:
        return {n: a.cpu() for n, a in self.ema.state_dict().items()}
