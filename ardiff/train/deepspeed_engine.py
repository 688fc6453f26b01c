"""The engine on DeepSpeed's ZeRO: workers share out optimizer state and average, gradients, weights.

The optimizer is torch's AdamW on each worker's float32 share, and it keeps the average of the weights beside its
moments, so that ZeRO shares out and offloads both alike. Checkpoints are whole tensors in the names of the model, see
:mod:`ardiff.train.checkpoint`. This is the only module that imports deepspeed; the others do without it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from ardiff import distributed
from ardiff.errors import ConfigError
from ardiff.train.engine import (
    SCALE,
    Precision,
    ResultT,
    optimizer_keys,
    recompute_activations,
    skeleton_of,
)
from ardiff.train.optim import OptimizerConfig

if TYPE_CHECKING:
    from ardiff.train.checkpoint import Shards

KEYS = ("exp_avg", "exp_avg_sq", "average")


class DeepSpeedEngine:
    """ZeRO stages 0 to 3 for one model."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerConfig,
        device: torch.device,
        precision: Precision,
        max_grad_norm: float,
        ema_decay: float,
        settings: dict[str, Any],
        activation_checkpointing: bool = False,
    ) -> None:
        """Raises ConfigError for an optimizer other than AdamW, or settings that DeepSpeed refuses.

        Args:
            settings: DeepSpeed's own configuration, from :func:`ardiff.train.engine.deepspeed_settings`.
        """
        if optimizer.name != "adamw":
            raise ConfigError(
                f"train.engine=deepspeed works with train.optimizer.name=adamw only, not {optimizer.name}: ZeRO cuts "
                "matrices into flat pieces, which Muon cannot orthogonalise. Take adamw, or train.engine=torch."
            )
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.skeleton = skeleton_of(model)
        if activation_checkpointing:
            recompute_activations(model)
        self.model, self.device, self.precision = model, device, precision
        self.stage = settings["zero_optimization"]["stage"]
        self.max_grad_norm, self.ema_decay = max_grad_norm, ema_decay
        self.adamw = AveragedAdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
            weight_decay=optimizer.weight_decay,
        )
        self.base_lr = optimizer.lr
        self.accumulating = False
        try:
            self.ds, self.zero, *_ = deepspeed.initialize(
                model=_Computation(model), optimizer=self.adamw, config=settings
            )
        except (ValueError, AssertionError, NotImplementedError) as error:
            raise ConfigError(f"DeepSpeed refuses the settings of train.deepspeed: {error}") from error
        for master in self._masters():
            self.adamw.begin(master)
        if self.stage in (1, 2):
            self.zero._lazy_init_hp_params_optimizer_state()

    def _masters(self) -> list[Tensor]:
        """The float32 tensors that AdamW updates: this worker's share of the weights, flat in stages 1 to 3."""
        match self.stage:
            case 0:
                return [p for p in self.model.parameters() if p.requires_grad]
            case 1 | 2:
                return list(self.zero.single_partition_of_fp32_groups)
            case _:
                return list(self.zero.fp32_partitioned_groups_flat)

    def compute(self, function: Callable[[], ResultT]) -> ResultT:
        # DeepSpeed prepares the backward pass in the forward pass of what it was given: all of the loss.
        result: ResultT = self.ds(function, self.device, self.precision)
        return result

    def backward(self, loss: Tensor) -> None:
        if self.accumulating:
            self.ds.step()  # no update, but DeepSpeed counts the parts of a batch by it
        self.ds.backward(loss, scale_wrt_gas=False)
        self.accumulating = True

    def step(self, step: int, lr_factor: float) -> float:
        for group in self.adamw.param_groups:
            group["lr"] = self.base_lr * lr_factor
        self.adamw.decay = min(self.ema_decay, (1 + step) / (10 + step))
        self.accumulating = False
        if self.stage == 0:
            norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm))
            if not math.isfinite(norm):
                self.model.zero_grad(set_to_none=True)
                self.ds.zero_grad()
                return norm
            self.ds.step()
            return norm
        self.ds.step()
        return float(self.ds.get_global_grad_norm())

    def learning_rates(self) -> dict[str, float]:
        return {"lr": self.adamw.param_groups[0]["lr"]}

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        step = self.adamw.state[self._masters()[0]]["step"]
        for name, parameter in self.model.named_parameters():
            yield "model", name, self._whole(parameter, None)
            yield "ema", name, self._whole(parameter, "average")
            for key in ("exp_avg", "exp_avg_sq"):
                yield "optimizer", f"{key}/{name}", self._whole(parameter, key)
            yield "optimizer", f"step/{name}", step.clone()
        if self.precision == "fp16":
            scaler = self.zero.loss_scaler
            yield "optimizer", SCALE, torch.tensor([scaler.cur_scale, scaler.cur_iter - scaler.last_overflow_iter])

    def restore(self, shards: Shards) -> None:
        keys = optimizer_keys(shards)
        steps = torch.zeros(())
        for name, parameter in self.model.named_parameters():
            shape = parameter.ds_shape if self.stage == 3 else parameter.shape  # type: ignore[attr-defined]
            value = torch.empty(shape)
            shards.fill("model", name, value)
            self._put(parameter, None, value)
            self._refresh(parameter, value)
            shards.fill("ema", name, value)
            self._put(parameter, "average", value)
            if set(keys.get(name, [])) - {"exp_avg", "exp_avg_sq", "step"}:
                raise ConfigError(
                    f"The checkpoint's optimizer keeps {', '.join(sorted(keys[name]))} of '{name}', not AdamW's "
                    "state: go on with the engine and optimizer that made it."
                )
            for key in ("exp_avg", "exp_avg_sq"):
                value.zero_()  # parameters that had no gradient yet have no moments
                if key in keys.get(name, []):
                    shards.fill("optimizer", f"{key}/{name}", value)
                self._put(parameter, key, value)
            if "step" in keys.get(name, []):
                steps = torch.maximum(steps, shards.read("optimizer", f"step/{name}"))
        for master in self._masters():
            self.adamw.state[master]["step"].copy_(steps)
        if self.precision == "fp16" and SCALE in shards.names("optimizer"):
            scale, growth = shards.read("optimizer", SCALE).tolist()
            scaler = self.zero.loss_scaler
            scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = scale, int(growth), 0

    def averaged_weights(self) -> dict[str, Tensor]:
        found = {}
        for name, parameter in self.model.named_parameters():
            whole = self._whole(parameter, "average")
            if distributed.rank() == 0:
                found[name] = whole.cpu().clone()
        return found

    def _whole(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        """A parameter in float32, or what the optimizer keeps of it under ``key``, put together from all workers."""
        if self.stage == 0:
            return parameter.detach() if key is None else self.adamw.state[parameter][key]
        whole = safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
        return whole.detach()

    def _put(self, parameter: Any, key: str | None, value: Tensor) -> None:
        """Writes this worker's share of ``value`` where :meth:`_whole` reads."""
        match self.stage:
            case 0:
                target = parameter if key is None else self.adamw.state[parameter][key]
                with torch.no_grad():
                    target.copy_(value)
            case 1 | 2:
                parameter.set_full_hp_param(value, key)
            case _:
                size = parameter.ds_tensor.ds_numel  # the same on every worker, the last one's is padded
                flat = F.pad(value.flatten(), (0, size * distributed.size() - value.numel()))
                share = flat.narrow(0, size * distributed.rank(), size)
                parameter._z3_optimizer.set_local_hp_param(share, parameter, key)

    def _refresh(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Writes ``value`` to the weights that the forward pass reads, rounded to its precision."""
        if self.stage == 3:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
        elif self.stage:
            parameter.data.copy_(value)


class AveragedAdamW(torch.optim.AdamW):
    """AdamW that keeps an exponential moving average of what it updates as part of its state."""

    decay = 0.0
    """Of the average, at the next step."""

    def begin(self, parameter: Tensor) -> None:
        """Makes the state of a parameter before its first step."""
        zeros = {key: torch.zeros_like(parameter, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
        average = parameter.detach().float().clone()
        self.state[parameter] = {"step": torch.zeros(()), **zeros, "average": average}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["average"].lerp_(parameter.detach().float(), 1.0 - self.decay)


class _Computation(nn.Module):
    """Lets DeepSpeed see a whole loss, however it calls the model, as the forward pass of one module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], ResultT], device: torch.device, precision: Precision) -> ResultT:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float16
        with torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32"):
            return function()
