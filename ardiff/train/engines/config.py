"""Settings of the engines. Nothing here imports deepspeed."""

from dataclasses import dataclass, field
from typing import Any, Literal

Precision = Literal["fp32", "bf16", "fp16"]
Linear = Literal["torch", "onednn", "auto"]
OFF: dict[str, Any] = {"enabled": False}
NO_OFFLOAD: dict[str, Any] = {"device": "none"}


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepSpeedConfig:
    """Settings of the engine ``deepspeed``."""

    stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: what is sharded over the workers. 0: nothing. 1: optimizer state and EMA. 2: gradients as well. 3:
    weights as well."""
    offload_optimizer: bool = False
    """Keep optimizer state and EMA in host memory (stages 1 to 3)."""
    offload_parameters: bool = False
    """Keep the weights in host memory (stage 3)."""
    raw: dict[str, Any] = field(default_factory=dict)
    """Further DeepSpeed settings under DeepSpeed's names. A value that contradicts the settings above is an error."""

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

    def settings(
        self, micro_batch_size: int, gradient_accumulation: int, max_grad_norm: float, precision: Precision
    ) -> dict[str, Any]:
        """DeepSpeed's own configuration. Raises ValueError if ``raw`` contradicts the other settings."""
        zero: dict[str, Any] = {
            "stage": self.stage,
            "offload_optimizer": {"device": "cpu"} if self.offload_optimizer else NO_OFFLOAD,
            "offload_param": {"device": "cpu"} if self.offload_parameters else NO_OFFLOAD,
        }
        bf16 = {"enabled": True, "check_grad_overflow": True} if precision == "bf16" and self.stage else OFF
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": gradient_accumulation,
            "gradient_clipping": max_grad_norm if self.stage else 0.0,  # without ZeRO the engine clips
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
            "bf16": bf16,
            "fp16": {"enabled": True} if precision == "fp16" else OFF,
        }
        merged = _merge_raw(settings, self.raw, "")
        if precision == "bf16" and self.stage == 1 and merged.get("data_types", {}).get("grad_accum_dtype") == "fp32":
            raise ValueError(
                "deepspeed.raw sets data_types.grad_accum_dtype = fp32, which DeepSpeed implements at stage 1 with an "
                "optimizer without EMA: set deepspeed.stage=2"
            )
        for section in (merged, merged["zero_optimization"]):  # disabled entries only serve the comparison with raw
            for name in [name for name, value in section.items() if value in (OFF, NO_OFFLOAD)]:
                del section[name]
        return merged


def _merge_raw(settings: dict[str, Any], raw: dict[str, Any], prefix: str) -> dict[str, Any]:
    """``settings`` with the entries of ``raw`` added. Raises ValueError if both set one key to different values."""
    merged = dict(settings)
    for key, value in raw.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(settings.get(key), dict):
            merged[key] = _merge_raw(settings[key], value, f"{path}.")
        elif key in settings and settings[key] != value:
            raise ValueError(
                f"deepspeed.raw sets {path} = {value!r}, but the other settings need {settings[key]!r}: remove it"
            )
        else:
            merged[key] = value
    return merged
