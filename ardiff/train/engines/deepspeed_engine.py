"""The DeepSpeed engine: ZeRO shards optimizer state and EMA, gradients and weights over the ranks.

Each rank runs torch's AdamW on its float32 shard. The optimizer keeps the EMA beside its moments, so ZeRO shards and
offloads both in the same way. Only this module imports deepspeed.
"""

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from ardiff import distributed
from ardiff.errors import ConfigError
from ardiff.tensors import trainable
from ardiff.train.config import OptimizerConfig
from ardiff.train.ema import ema_decay_at
from ardiff.train.engines.base import (
    LOSS_SCALE,
    LossModule,
    ResultT,
    checkpoint_activations,
    optimizer_keys,
    skeleton_of,
)
from ardiff.train.engines.config import Precision
from ardiff.train.shards import ShardReader

MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedEngine:
    """Updates one model under a ZeRO stage, 0 to 3; see :class:`ardiff.train.engines.base.Engine`."""

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
        """Raises ConfigError for an optimizer other than AdamW, or for settings that DeepSpeed rejects.

        Args:
            settings: DeepSpeed's own configuration, from :meth:`ardiff.train.config.TrainConfig.deepspeed_settings`.
        """
        if optimizer.name != "adamw":
            raise ConfigError(
                f"train.engine=deepspeed needs train.optimizer.name=adamw, not {optimizer.name}: ZeRO shards matrices "
                "into flat pieces, which Muon cannot orthogonalise. Use adamw, or train.engine=torch."
            )
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.skeleton = skeleton_of(model)
        if activation_checkpointing:
            checkpoint_activations(model)
        self.model, self.device, self.precision = model, device, precision
        self.stage = settings["zero_optimization"]["stage"]
        self.max_grad_norm, self.ema_decay = max_grad_norm, ema_decay
        self.adamw = AdamWWithEMA(
            list(trainable(model).values()),
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
            weight_decay=optimizer.weight_decay,
        )
        self.base_lr = optimizer.lr
        self.accumulating = False
        try:
            self.ds, self.zero, *_ = deepspeed.initialize(
                model=LossModule(model), optimizer=self.adamw, config=settings
            )
        except (ValueError, AssertionError, NotImplementedError) as error:
            raise ConfigError(f"DeepSpeed rejects the settings of train.deepspeed: {error}") from error
        for master in self._masters():
            self.adamw.init_state(master)
        if self.stage in (1, 2):
            self.zero._lazy_init_hp_params_optimizer_state()

    def _masters(self) -> list[Tensor]:
        """The float32 tensors that AdamW updates: this rank's shard of the weights, flat in stages 1 to 3."""
        match self.stage:
            case 0:
                return list(trainable(self.model).values())
            case 1 | 2:
                return list(self.zero.single_partition_of_fp32_groups)
            case _:
                return list(self.zero.fp32_partitioned_groups_flat)

    def compute(self, function: Callable[[], ResultT]) -> ResultT:
        # DeepSpeed sets up the backward pass in its module's forward pass, so the whole loss must run in that module.
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        with torch.autocast(self.device.type, dtype=dtype, enabled=self.precision != "fp32"):
            result: ResultT = self.ds(function)
        return result

    def backward(self, loss: Tensor) -> None:
        if self.accumulating:
            self.ds.step()  # not an update: DeepSpeed counts micro-batches by these calls
        self.ds.backward(loss, scale_wrt_gas=False)
        self.accumulating = True

    def step(self, step: int, lr_factor: float) -> float:
        for group in self.adamw.param_groups:
            group["lr"] = self.base_lr * lr_factor
        self.adamw.decay = ema_decay_at(step, self.ema_decay)
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
        for name, parameter in trainable(self.model).items():
            yield "model", name, self._gather(parameter, None)
            yield "ema", name, self._gather(parameter, "ema")
            for key in MOMENTS:
                yield "optimizer", f"{key}/{name}", self._gather(parameter, key)
            yield "optimizer", f"step/{name}", step.clone()
        if self.precision == "fp16":
            scaler = self.zero.loss_scaler
            yield "optimizer", LOSS_SCALE, torch.tensor([scaler.cur_scale, scaler.cur_iter - scaler.last_overflow_iter])

    def restore(self, shards: ShardReader) -> None:
        keys = optimizer_keys(shards)
        steps = torch.zeros(())
        for name, parameter in trainable(self.model).items():
            shape = parameter.ds_shape if self.stage == 3 else parameter.shape  # type: ignore[attr-defined]
            value = torch.empty(shape)
            shards.copy_to("model", name, value)
            self._scatter(parameter, None, value)
            self._refresh(parameter, value)
            shards.copy_to("ema", name, value)
            self._scatter(parameter, "ema", value)
            if set(keys.get(name, [])) - {*MOMENTS, "step"}:
                raise ConfigError(
                    f"The checkpoint holds {', '.join(sorted(keys[name]))} as optimizer state of '{name}', which is "
                    "not AdamW's: resume with the engine and optimizer that wrote it."
                )
            for key in MOMENTS:
                value.zero_()  # a parameter without gradients so far has no moments
                if key in keys.get(name, []):
                    shards.copy_to("optimizer", f"{key}/{name}", value)
                self._scatter(parameter, key, value)
            if "step" in keys.get(name, []):
                steps = torch.maximum(steps, shards.read("optimizer", f"step/{name}"))
        for master in self._masters():
            self.adamw.state[master]["step"].copy_(steps)
        if self.precision == "fp16" and LOSS_SCALE in shards.names("optimizer"):
            scale, growth = shards.read("optimizer", LOSS_SCALE).tolist()
            scaler = self.zero.loss_scaler
            scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = scale, int(growth), 0

    def ema_weights(self) -> dict[str, Tensor]:
        weights = {}
        for name, parameter in trainable(self.model).items():
            whole = self._gather(parameter, "ema")
            if distributed.rank() == 0:
                weights[name] = whole.cpu().clone()
        return weights

    def _gather(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        """The whole parameter in float32, or its optimizer state ``key``, gathered from all ranks."""
        if self.stage == 0:
            return parameter.detach() if key is None else self.adamw.state[parameter][key]
        whole = safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
        return whole.detach()

    def _scatter(self, parameter: Any, key: str | None, value: Tensor) -> None:
        """Writes this rank's shard of ``value``, the inverse of :meth:`_gather`."""
        match self.stage:
            case 0:
                target = parameter if key is None else self.adamw.state[parameter][key]
                with torch.no_grad():
                    target.copy_(value)
            case 1 | 2:
                parameter.set_full_hp_param(value, key)
            case _:
                size = parameter.ds_tensor.ds_numel  # the same on every rank; the last rank's shard is padded
                flat = F.pad(value.flatten(), (0, size * distributed.size() - value.numel()))
                shard = flat.narrow(0, size * distributed.rank(), size)
                parameter._z3_optimizer.set_local_hp_param(shard, parameter, key)

    def _refresh(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Writes ``value`` to the weights that the forward pass reads, rounded to their precision."""
        if self.stage == 3:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
        elif self.stage:
            parameter.data.copy_(value)


class AdamWWithEMA(torch.optim.AdamW):
    """AdamW whose state also holds an EMA of the parameters."""

    decay = 0.0
    """EMA decay of the next step."""

    def init_state(self, parameter: Tensor) -> None:
        """Creates the state of a parameter before its first step."""
        zeros = {key: torch.zeros_like(parameter, requires_grad=False) for key in MOMENTS}
        self.state[parameter] = {"step": torch.zeros(()), **zeros, "ema": parameter.detach().float().clone()}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["ema"].lerp_(parameter.detach().float(), 1.0 - self.decay)
