"""The plain PyTorch engine: every rank holds weights and optimizer state, and gradients are averaged."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ardiff import distributed
from ardiff.tensors import trainable
from ardiff.train.config import OptimizerConfig
from ardiff.train.ema import EMA
from ardiff.train.engines.base import (
    LOSS_SCALE,
    ResultT,
    checkpoint_activations,
    optimizer_keys,
    skeleton_of,
)
from ardiff.train.engines.config import Precision
from ardiff.train.muon import Muon
from ardiff.train.optim import build_optimizers
from ardiff.train.shards import ShardReader

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEngine:
    """Updates one model with AdamW or Muon; see :class:`ardiff.train.engines.base.Engine`."""

    muon_class = Muon

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerConfig,
        device: torch.device,
        precision: Precision = "fp32",
        max_grad_norm: float = 1.0,
        ema_decay: float = 0.995,
        activation_checkpointing: bool = False,
    ) -> None:
        self.skeleton = skeleton_of(model)
        if activation_checkpointing:
            checkpoint_activations(model)
        self.model = model.to(device)
        self.device = device
        self.precision = precision
        self._distribute(model)
        self.max_grad_norm = max_grad_norm
        self.optimizers = build_optimizers(model, optimizer, self.muon_class)
        self.base_lrs = [group["lr"] for o in self.optimizers for group in o.param_groups]
        self.ema = EMA(model, ema_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def _distribute(self, model: nn.Module) -> None:
        """Prepares the model's parameters before optimizers and EMA are built on them."""

    def compute(self, function: Callable[[], ResultT]) -> ResultT:
        with torch.autocast(self.device.type, dtype=DTYPES[self.precision], enabled=self.precision != "fp32"):
            return function()

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, step: int, lr_factor: float) -> float:
        self._average_gradients()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = float(self._whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)))
        if math.isfinite(norm):
            groups = [group for o in self.optimizers for group in o.param_groups]
            for group, lr in zip(groups, self.base_lrs, strict=True):
                group["lr"] = lr * lr_factor
            for optimizer in self.optimizers:
                optimizer.step()
            self.ema.update(self.model, step)
        self.scaler.update()
        self.model.zero_grad(set_to_none=True)
        return norm

    def _average_gradients(self) -> None:
        """Averages the gradients over all ranks."""
        distributed.average_([p.grad for p in self.model.parameters() if p.grad is not None])

    def learning_rates(self) -> dict[str, float]:
        names = ["muon_lr" if isinstance(optimizer, torch.optim.Muon) else "lr" for optimizer in self.optimizers]
        return {name: o.param_groups[0]["lr"] for name, o in zip(names, self.optimizers, strict=True)}

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        parameters = trainable(self.model)
        for name, parameter in parameters.items():
            yield "model", name, self._whole(parameter)
            yield "ema", name, self._whole(self.ema.weights[name])
        names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
        for optimizer in self.optimizers:
            for owner, state in optimizer.state.items():
                for key, value in state.items():
                    yield "optimizer", f"{key}/{names[owner]}", self._whole(value)
        if self.scaler.is_enabled():
            yield "optimizer", LOSS_SCALE, torch.tensor([self.scaler.get_scale(), self.scaler._get_growth_tracker()])

    def restore(self, shards: ShardReader) -> None:
        owners = {p: o for o in self.optimizers for group in o.param_groups for p in group["params"]}
        keys = optimizer_keys(shards)
        for name, parameter in trainable(self.model).items():
            for group, target in (("model", parameter), ("ema", self.ema.weights[name])):
                value = torch.empty(target.shape)
                shards.copy_to(group, name, value)
                with torch.no_grad():
                    target.copy_(self._placed(value, target))
            state = {key: shards.read("optimizer", f"{key}/{name}") for key in keys.get(name, [])}
            # torch keeps the step count on the CPU.
            owners[parameter].state[parameter] = {
                key: value if key == "step" else self._placed(value, parameter) for key, value in state.items()
            }
        if self.scaler.is_enabled() and LOSS_SCALE in shards.names("optimizer"):
            scale, growth = shards.read("optimizer", LOSS_SCALE).tolist()
            scaler = {**self.scaler.state_dict(), "scale": scale, "_growth_tracker": int(growth)}
            self.scaler.load_state_dict(scaler)

    def ema_weights(self) -> dict[str, Tensor]:
        weights = {}
        for name, weight in self.ema.weights.items():
            value = self._whole(weight)
            if distributed.rank() == 0:
                weights[name] = value.cpu().clone()
        return weights

    def _whole(self, tensor: Tensor) -> Tensor:
        """The whole of a tensor that each rank may hold a part of."""
        return tensor

    def _placed(self, value: Tensor, like: Tensor) -> Tensor:
        """A whole tensor, on the device and in the parts in which ranks hold ``like``."""
        return value.to(like.device)
