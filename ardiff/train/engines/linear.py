"""Chooses what multiplies the matrices of linear layers when a CPU trains: torch or oneDNN."""

import json
import logging
import os
import platform
import time
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ardiff import onednn
from ardiff.data.packages import cache_folder
from ardiff.train.engines.config import Linear

logger = logging.getLogger(__name__)

FixedLinear = Literal["torch", "onednn"]
ROWS, WIDTH = 1024, 96
ROUNDS = 8


def choose_linear(setting: Linear) -> FixedLinear:
    """What computes linear layers on this CPU: the setting, :func:`fastest_linear`, or torch if it has no oneDNN."""
    if not onednn.available():
        return "torch"
    return fastest_linear() if setting == "auto" else setting


def fastest_linear() -> FixedLinear:
    """What is faster on this processor with this torch and this number of threads.

    It is measured once, within a second, and kept in the cache folder, so that all runs of one kind of machine compute
    alike: a run that is resumed gives the same bits. Needs oneDNN.
    """
    key = f"{_processor()}, torch {torch.__version__}, threads {torch.get_num_threads()}"
    file = cache_folder() / "linear.json"
    known = _read(file)
    if key not in known:
        plain, fast = _measure()
        known[key] = "onednn" if fast < plain else "torch"
        logger.info("Linear layers by %s: oneDNN is %.2f times as fast as torch here.", known[key], plain / fast)
        _write(file, known)
    return known[key]


def _measure() -> tuple[float, float]:
    """Seconds of a forward and a backward pass by torch and by oneDNN, the least of some alternating rounds."""
    layers = [nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(2)]
    onednn.accelerate_linear(layers[1])
    x = torch.ones(ROWS, WIDTH, requires_grad=True)
    times: tuple[list[float], list[float]] = ([], [])
    with torch.enable_grad():
        for _ in range(ROUNDS):
            for layer, measured in zip(layers, times, strict=True):
                start = time.perf_counter()
                layer(x).sum().backward()
                measured.append(time.perf_counter() - start)
    return min(times[0]), min(times[1])


def _processor() -> str:
    """The processor's name: Linux has it in a file, other systems in :mod:`platform`."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = [line for line in lines if line.startswith("flags")]
    return f"{names[0]} {'avx512f' if ' avx512f' in flags[0] else ''}" if names and flags else platform.processor()


def _read(file: Path) -> dict[str, FixedLinear]:
    """The choices of before; none if the file is missing or damaged."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if v in ("torch", "onednn")} if isinstance(found, dict) else {}


def _write(file: Path, choices: dict[str, FixedLinear]) -> None:
    """Replaces the file as a whole. A folder that cannot be written is no error: the next run measures again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}")
        part.write_text(json.dumps(choices, indent=1))
        part.replace(file)
    except OSError as error:
        logger.warning("The choice of linear layers is not kept: %s", error)
