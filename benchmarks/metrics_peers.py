"""Digits to which ardiff's distances and networks agree with other implementations, from stored values of theirs.

    python benchmarks/metrics_peers.py

The values are in ``tests/golden/metrics``: inputs come from rules, outputs from the implementations themselves.
"""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from ardiff.metrics.frechet import frechet_distance, kernel_distance
from ardiff.metrics.networks.i3d import I3D

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "metrics"
CASES = ("d64_n512", "logits_d400_n2048", "rankdef_d400_n256")


def load(name: str) -> ModuleType:
    """A module of rules beside the stored values."""
    spec = importlib.util.spec_from_file_location(name, GOLDEN / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digits(value: float, expected: float) -> str:
    """The number of decimal digits that agree."""
    difference = abs(value - expected) / abs(expected)
    return "all" if difference == 0 else f"{-np.log10(difference):.1f}"


def distances() -> None:
    """The distances of the same features."""
    stored, cases = json.loads((GOLDEN / "frechet_fixtures.json").read_text())["pairs"], load("cases")
    pairs = {name: cases.pair(name) for name in CASES}
    print(f"| distance | implementation | {' | '.join(CASES)} |")
    print(f"|---|---|{'---|' * len(CASES)}")
    for peer in stored[CASES[0]]["frechet"]:
        ddof = 0 if "ddof0" in peer else 1
        values = [frechet_distance(real, fake, ddof) for real, fake in map(cases.pair, CASES)]
        cells = [digits(value, stored[n]["frechet"][peer]) for n, value in zip(CASES, values, strict=True)]
        print(f"| Frechet | {peer} | {' | '.join(cells)} |", flush=True)
    for peer in ("tats_polynomial_mmd_full_unbiased", "torchmetrics_poly_mmd_full_f64"):
        cells = [digits(kernel_distance(*pairs[name]), stored[name]["kernel"][peer]) for name in CASES]
        print(f"| kernel | {peer} | {' | '.join(cells)} |", flush=True)


@torch.no_grad()
def networks() -> None:
    """I3D with weights made by a rule, on 16 frames."""
    expected, outputs = (
        json.loads((GOLDEN / "net_fixtures.json").read_text())["i3d"],
        np.load(GOLDEN / "net_outputs.npz"),
    )
    rules = load("fill")
    model = I3D().eval()
    model.load_state_dict(
        {k: torch.from_numpy(v) for k, v in rules.fill(expected["state_shapes"], expected["seed"]).items()}
    )
    run = expected["runs"]["T16"]
    logits = model(torch.from_numpy(rules.clip(run["clip_seed"], run["clip_shape"])))[0].numpy()
    print("\n| network | implementation | largest difference over largest value |")
    print("|---|---|---|")
    for name in ("tfhub_style_logits400", "authors_logits400", "cdfvd_logits400"):
        other = outputs[f"i3d_T16_{name}"]
        print(f"| I3D | {name} | {np.abs(logits - other).max() / np.abs(other).max():.1e} |")


if __name__ == "__main__":
    distances()
    networks()
