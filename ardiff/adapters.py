"""Low-rank adapters of an AR-DiT as folders in the format of PEFT: ``adapter_config.json`` and
``adapter_model.safetensors``."""

import json
from dataclasses import dataclass

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ardiff.data import storage
from ardiff.dit.config import LoRAConfig
from ardiff.dit.lora import target_pattern
from ardiff.errors import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's layers."""
UNSUPPORTED = ("use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "layer_replication")
"""Variants of LoRA in PEFT's configuration that change what an adapter computes."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A low-rank adapter, see :mod:`ardiff.dit.lora`."""

    weights: dict[str, Tensor]
    """``LAYER.lora_A.weight`` and ``LAYER.lora_B.weight`` of each adapted layer."""
    scale: float
    """The factor of every update, ``alpha / r``."""


def save_adapter(uri: str, weights: dict[str, Tensor], config: LoRAConfig, base: str) -> None:
    """Writes the folder of an adapter, local or ``s3://``; its configuration comes last and marks it complete."""
    described = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": target_pattern(config),
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {f"{PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    storage.write_bytes(storage.join(uri, WEIGHTS), save(tensors))
    storage.write_bytes(storage.join(uri, CONFIG), json.dumps(described, indent=1).encode())


def read_adapter(uri: str) -> Adapter:
    """Reads an adapter that :func:`save_adapter` or PEFT has written.

    Raises:
        CheckpointError: There is none, it is damaged, or it is of a kind other than plain LoRA.
    """
    file, weights_file = storage.join(uri, CONFIG), storage.join(uri, WEIGHTS)
    if not storage.exists(file):
        raise CheckpointError(f"There is no adapter in {uri}: it should hold {CONFIG}.")
    try:
        config = json.loads(storage.read_bytes(file))
        kind, rank, alpha = config["peft_type"], int(config["r"]), float(config["lora_alpha"])
        scale, stored = alpha / rank, load(storage.read_bytes(weights_file))
    except (ValueError, KeyError, TypeError, ZeroDivisionError, SafetensorError) as error:
        raise CheckpointError(f"The adapter in {uri} is damaged: {error!r}") from error
    variants = [name for name in UNSUPPORTED if config.get(name)]
    if kind != "LORA" or variants:
        raise CheckpointError(
            f"The adapter in {uri} is no plain LoRA, but {' with '.join([str(kind), *variants])}: merge it with PEFT."
        )
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}
    layers = {name.rpartition(".lora_")[0] for name in weights}
    if not layers or set(weights) != {f"{layer}.lora_{part}.weight" for layer in layers for part in "AB"}:
        raise CheckpointError(f"{weights_file} holds other tensors than lora_A and lora_B of linear layers.")
    if any(
        weights[f"{x}.lora_A.weight"].shape[0] != rank or weights[f"{x}.lora_B.weight"].shape[1:] != (rank,)
        for x in layers
    ):
        raise CheckpointError(f"{weights_file} holds matrices of another rank than {CONFIG} says, {rank}.")
    return Adapter(weights, scale)
