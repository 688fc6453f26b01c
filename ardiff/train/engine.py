"""Engines: what turns a loss into an update. The loop knows this interface only."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ardiff import distributed
from ardiff.train.ema import EMA
from ardiff.train.flops import recomputation
from ardiff.train.optim import OptimizerConfig, build_optimizers

if TYPE_CHECKING:
    from ardiff.train.checkpoint import Shards

ResultT = TypeVar("ResultT")
Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Engine(Protocol):
    """Owns a model, its optimizer state and its average; all workers of a run hold one and call it alike."""

    model: nn.Module
    device: torch.device
    skeleton: nn.Module
    """A copy of the model without weights, for evaluation."""

    def compute(self, function: Callable[[], ResultT]) -> ResultT:
        """Calls ``function``, which evaluates the model, in the engine's precision; all training passes go this way."""

    def backward(self, loss: Tensor) -> None:
        """Accumulates gradients of ``loss``, the mean over this worker's samples."""

    def step(self, step: int, lr_factor: float) -> float:
        """Averages gradients over the workers, clips, updates weights and average, clears the gradients.

        Returns the norm before clipping; if it is not finite, everything but the loss scale of fp16 stays as it was.
        """

    def learning_rates(self) -> dict[str, float]:
        """Those of the last update, by the names of their settings: ``lr`` and, with Muon, ``muon_lr``."""

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """All that a checkpoint holds: part, name and whole tensor, in the same order on every worker.

        Parts: ``model`` and ``ema``, float32 by parameter name, and ``optimizer``, by ``KEY/PARAMETER``.
        """

    def restore(self, shards: Shards) -> None:
        """Takes over what :meth:`tensors` gave, on this or another engine with any number of workers."""

    def averaged_weights(self) -> dict[str, Tensor]:
        """The averaged parameters by name, float32, on the CPU; empty on all workers but the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepSpeedConfig:
    """What the DeepSpeed engine does beyond the plain one."""

    stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: what the workers share out. 0 nothing, 1 the optimizer's state and the average, 2 gradients as well,
    3 the weights too."""
    offload_optimizer: bool = False
    """Keep optimizer state and average in the host's memory (stages 1 to 3)."""
    offload_parameters: bool = False
    """Keep the weights in the host's memory (stage 3)."""
    raw: dict[str, Any] = field(default_factory=dict)
    """Further DeepSpeed settings, in its own words; what contradicts the settings above is refused."""

    def __post_init__(self) -> None:
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3")
        if self.offload_parameters and self.stage != 3:
            raise ValueError("offload_parameters needs stage 3")
        for section, remedy in {
            "optimizer": "set train.optimizer",
            "scheduler": "set train.optimizer.schedule",
            "zero_force_ds_cpu_optimizer": "the optimizer is torch's",
        }.items():
            if section in self.raw:
                raise ValueError(f"deepspeed.raw must not hold '{section}': {remedy}")


def deepspeed_settings(
    config: DeepSpeedConfig, micro_batch_size: int, gradient_accumulation: int, max_grad_norm: float, precision: str
) -> dict[str, Any]:
    """DeepSpeed's own configuration. Raises ValueError if ``config.raw`` contradicts the rest."""
    off, nowhere = {"enabled": False}, {"device": "none"}
    zero: dict[str, Any] = {
        "stage": config.stage,
        "offload_optimizer": {"device": "cpu"} if config.offload_optimizer else nowhere,
        "offload_param": {"device": "cpu"} if config.offload_parameters else nowhere,
    }
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation,
        "gradient_clipping": max_grad_norm if config.stage else 0.0,  # without ZeRO the engine clips
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "bf16": {"enabled": True, "check_grad_overflow": True} if precision == "bf16" and config.stage else off,
        "fp16": {"enabled": True} if precision == "fp16" else off,
    }
    settings = _with_raw(ours, config.raw, "")
    for section in (settings, settings["zero_optimization"]):  # what is off was there to be compared
        for name in [name for name, value in section.items() if value in (off, nowhere)]:
            del section[name]
    return settings


def _with_raw(ours: dict[str, Any], raw: dict[str, Any], where: str) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in raw.items():
        path = f"{where}{key}"
        if isinstance(value, dict) and isinstance(ours.get(key), dict):
            merged[key] = _with_raw(ours[key], value, f"{path}.")
        elif key in ours and ours[key] != value:
            raise ValueError(
                f"deepspeed.raw says {path} = {value!r}, the other settings say {ours[key]!r}: drop it there"
            )
        else:
            merged[key] = value
    return merged


def skeleton_of(model: nn.Module) -> nn.Module:
    """A copy with buffers but no weights (they are on the meta device), made before hooks are put on ``model``."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, empty).eval()


def recompute_activations(model: nn.Module) -> None:
    """Has every block of ``model`` computed again in the backward pass instead of keeping what it computed."""
    for module in model.modules():
        for name, children in module.named_children():
            if name == "blocks" and isinstance(children, nn.ModuleList):
                for block in children:
                    block.forward = functools.partial(
                        checkpoint,
                        block.forward,
                        use_reentrant=False,
                        preserve_rng_state=False,
                        context_fn=lambda: (contextlib.nullcontext(), recomputation()),
                    )


class TorchEngine:
    """Plain PyTorch: every worker holds everything, gradients are averaged."""

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
            recompute_activations(model)
        self.model = model.to(device)
        self.device = device
        self.precision = precision
        self.max_grad_norm = max_grad_norm
        self.optimizers = build_optimizers(model, optimizer)
        self.base_lrs = [group["lr"] for o in self.optimizers for group in o.param_groups]
        self.ema = EMA(model, ema_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def compute(self, function: Callable[[], ResultT]) -> ResultT:
        with torch.autocast(self.device.type, dtype=DTYPES[self.precision], enabled=self.precision != "fp32"):
            return function()

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, step: int, lr_factor: float) -> float:
        distributed.average_([p.grad for p in self.model.parameters() if p.grad is not None])
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm))
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

    def learning_rates(self) -> dict[str, float]:
        names = ["muon_lr" if isinstance(optimizer, torch.optim.Muon) else "lr" for optimizer in self.optimizers]
        return {name: o.param_groups[0]["lr"] for name, o in zip(names, self.optimizers, strict=True)}

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield "model", name, parameter
            yield "ema", name, self.ema.average[name]
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer in self.optimizers:
            for owner, state in optimizer.state.items():
                for key, value in state.items():
                    yield "optimizer", f"{key}/{names[owner]}", value
        if self.scaler.is_enabled():
            yield "optimizer", SCALE, torch.tensor([self.scaler.get_scale(), self.scaler._get_growth_tracker()])

    def restore(self, shards: Shards) -> None:
        owners = {p: o for o in self.optimizers for group in o.param_groups for p in group["params"]}
        keys = optimizer_keys(shards)
        for name, parameter in self.model.named_parameters():
            shards.fill("model", name, parameter)
            shards.fill("ema", name, self.ema.average[name])
            found = {key: shards.read("optimizer", f"{key}/{name}") for key in keys.get(name, [])}
            # torch keeps the count of steps on the CPU.
            owners[parameter].state[parameter] = {
                key: value if key == "step" else value.to(self.device) for key, value in found.items()
            }
        if self.scaler.is_enabled() and SCALE in shards.names("optimizer"):
            scale, growth = shards.read("optimizer", SCALE).tolist()
            scaler = {**self.scaler.state_dict(), "scale": scale, "_growth_tracker": int(growth)}
            self.scaler.load_state_dict(scaler)

    def averaged_weights(self) -> dict[str, Tensor]:
        return {n: a.cpu().clone() for n, a in self.ema.state_dict().items()} if distributed.rank() == 0 else {}


SCALE = "scale/"
"""The name of fp16's loss scale among the optimizer's tensors: the scale, and the steps since it changed."""


def optimizer_keys(shards: Shards) -> dict[str, list[str]]:
    """For each parameter, the keys under which the checkpoint's optimizer keeps something about it."""
    found: dict[str, list[str]] = {}
    for entry in shards.names("optimizer"):
        key, _, name = entry.partition("/")
        if name:
            found.setdefault(name, []).append(key)
    return found
