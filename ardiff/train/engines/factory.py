"""Makes the engine that a configuration asks for."""

import os
from dataclasses import replace

import torch
from torch import nn

from ardiff import distributed, onednn
from ardiff.errors import ConfigError
from ardiff.train.config import TrainConfig
from ardiff.train.engines.base import Engine
from ardiff.train.engines.linear import choose_linear
from ardiff.train.engines.torch_engine import TorchEngine


def make_engine(model: nn.Module, config: TrainConfig, device: torch.device) -> Engine:
    """The configured engine for ``model``. FSDP and DeepSpeed need an initialised process group."""
    common = (config.optimizer, device, config.precision, config.max_grad_norm, config.ema_decay)
    match config.engine:
        case "torch":
            engine = TorchEngine(model, *common, activation_checkpointing=config.activation_checkpointing)
            if device.type == "cpu" and choose_linear(config.linear) == "onednn":
                onednn.accelerate_linear(model)
            return engine
        case "fsdp":
            from ardiff.train.engines.fsdp_engine import FSDPEngine

            return FSDPEngine(model, *common, activation_checkpointing=config.activation_checkpointing)
        case "deepspeed":
            if device.type == "cpu":
                os.environ.setdefault("DS_ACCELERATOR", "cpu")
            try:
                from ardiff.train.engines.deepspeed_engine import DeepSpeedEngine
            except ModuleNotFoundError as error:
                raise ConfigError("train.engine=deepspeed needs DeepSpeed: pip install 'ardiff[train]'.") from error
            settings = config.deepspeed_settings(distributed.size())
            return DeepSpeedEngine(model, *common, settings, activation_checkpointing=config.activation_checkpointing)
        case _:
            raise ValueError(f"unknown engine {config.engine!r}")


def make_discriminator_engine(discriminator: nn.Module, config: TrainConfig, device: torch.device) -> Engine:
    """The engine of a task's discriminator, with its whole weights on every rank: the model's loss needs them."""
    deepspeed = replace(config.deepspeed, stage=min(config.deepspeed.stage, 2), offload_parameters=False)
    engine = "torch" if config.engine == "fsdp" else config.engine
    return make_engine(discriminator, replace(config, engine=engine, deepspeed=deepspeed), device)
