"""Small weights with the authors' tensor names, filled by the rule that the golden outputs were made with."""

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ardiff.layers import sincos_positions

GOLDEN = Path(__file__).parents[2] / "golden" / "upstream"


def filled(key: str, shape: list[int]) -> Tensor:
    if key.endswith("pos_embed"):
        return sincos_positions(torch.arange(shape[1]), shape[2])[None]
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    if len(shape) == 1:
        return (1.0 if key.endswith("weight") else 0.0) + 0.1 * draw
    return draw / math.sqrt(math.prod(shape[1:]))


@pytest.fixture(scope="session")
def weights() -> Callable[[str], dict[str, Tensor]]:
    """``weights("dit" | "vae_img" | "vae_wt")``: a new dict of the small model's weights by the authors' names."""
    filled_once: dict[str, dict[str, Tensor]] = {}

    def make(kind: str) -> dict[str, Tensor]:
        if kind not in filled_once:
            shapes = json.loads((GOLDEN / f"{kind}_parity.json").read_text())["state_dict"]
            filled_once[kind] = {key: filled(key, shape) for key, shape in shapes.items()}
        return dict(filled_once[kind])

    return make


@pytest.fixture(scope="session")
def numbers() -> Callable[[str], dict[str, Tensor]]:
    """``numbers("dit" | "vae_img" | "vae_wt" | "sampler")``: inputs and outputs of the authors' code."""

    def read(kind: str) -> dict[str, Tensor]:
        with np.load(GOLDEN / f"{kind}_parity.npz") as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}

    return read


@pytest.fixture(scope="session")
def full_keys() -> Callable[[str], tuple[dict[str, list[int]], int]]:
    """``full_keys("dit" | "vae_img" | "vae_wt")``: names and shapes of the full-size weights, and their total size."""

    def read(kind: str) -> tuple[dict[str, list[int]], int]:
        content = json.loads((GOLDEN / f"{kind}_full_keys.json").read_text())
        return content["dit_full" if kind == "dit" else "state_dict"], content["n_params"]

    return read
