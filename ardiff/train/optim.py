"""Optimizers and learning-rate schedules."""

import math

import torch
from torch import nn

from ardiff.tensors import trainable
from ardiff.train.config import OptimizerConfig
from ardiff.train.muon import Muon


def build_optimizers(
    model: nn.Module, config: OptimizerConfig, muon_class: type[Muon] = Muon
) -> list[torch.optim.Optimizer]:
    """The optimizers that together update every trainable parameter of ``model`` once."""
    parameters = trainable(model)
    matrices = {n: p for n, p in parameters.items() if config.name == "muon" and p.ndim == 2 and "blocks." in n}
    others = [p for n, p in parameters.items() if n not in matrices]
    fused = True if all(p.is_cuda for p in others) else None  # one kernel for all parameters; None is torch's default
    betas = (config.beta1, config.beta2)
    adamw = torch.optim.AdamW(others, lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=fused)
    if not matrices:
        return [adamw]
    muon = muon_class(list(matrices.values()), lr=config.muon_lr, weight_decay=config.weight_decay)
    return [adamw, muon]


def learning_rate_factor(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The factor of all learning rates at ``step`` (0-based) of ``num_steps``."""
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
