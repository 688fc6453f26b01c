"""Optimizers and learning-rate laws."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """How the weights are updated."""

    name: Literal["adamw", "muon"] = "adamw"
    """``muon`` orthogonalises the updates of the matrices inside blocks (Jordan et al., 2024) and leaves everything
    else to AdamW; it needs several times fewer steps on small models."""
    lr: float = 2e-4
    """Learning rate of AdamW."""
    muon_lr: float = 1e-2
    """Learning rate of Muon."""
    weight_decay: float = 0.0
    """Decoupled weight decay, of both."""
    beta1: float = 0.9
    """First moment decay of AdamW."""
    beta2: float = 0.99
    """Second moment decay of AdamW."""
    schedule: Literal["constant", "drop", "cosine"] = "constant"
    """After the warm-up: ``constant``; ``drop``: constant, then constant again at ``drop_factor`` of it; ``cosine``:
    half a cosine down to a hundredth at the last step."""
    drop_step: int = 100_000
    """First step (0-based) of the second phase of ``drop``."""
    drop_factor: float = 0.05
    """Learning rate of the second phase of ``drop`` over that of the first: Sec. 4.1 goes from 2e-4 to 1e-5."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from zero."""

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.muon_lr <= 0:
            raise ValueError("lr and muon_lr must be above 0")
        if self.warmup_steps < 0 or self.weight_decay < 0:
            raise ValueError("warmup_steps and weight_decay must not be negative")
        if self.drop_step < 0 or self.drop_factor <= 0:
            raise ValueError("drop_step must not be negative, and drop_factor must be above 0")


def build_optimizers(model: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """The optimizers that together update every parameter of ``model`` once."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    matrices = {n: p for n, p in parameters.items() if config.name == "muon" and p.ndim == 2 and "blocks." in n}
    others = [p for n, p in parameters.items() if n not in matrices]
    adamw = torch.optim.AdamW(
        others, lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
    )
    if not matrices:
        return [adamw]
    muon = torch.optim.Muon(list(matrices.values()), lr=config.muon_lr, weight_decay=config.weight_decay)
    return [adamw, muon]


def learning_rate_factor(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """What both learning rates are multiplied by at ``step`` (0-based) of ``num_steps``."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    match config.schedule:
        case "constant":
            return warmup
        case "drop":
            return warmup * (config.drop_factor if step >= config.drop_step else 1.0)
        case "cosine":
            done = max(0, step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
            return warmup * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0))))
        case _:
            raise ValueError(f"unknown schedule {config.schedule!r}")
