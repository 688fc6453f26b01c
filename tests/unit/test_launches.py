"""Kernels and waits, counted without a GPU: ``benchmarks/launches.py`` and what it counts with."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from ardiff.gpu_check.launches import LaunchCounter

BENCHMARK = Path(__file__).parents[2] / "benchmarks/launches.py"
CPU, META = torch.device("cpu"), torch.device("meta")


def test_views_and_empty_tensors_launch_nothing() -> None:
    x = torch.ones(2, 3)
    with LaunchCounter(CPU) as counter:
        x.t()[0].unflatten(0, (1, 2)).detach().new_empty(4)
        assert counter.kernels == 0
        _ = x + x
        x.reshape(3, 2)  # a view
        x.t().reshape(6)  # a copy
    assert (counter.kernels, counter.syncs) == (2, 0)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_composite_operators_count_as_what_they_run(context: type) -> None:
    """A linear layer on three axes is one product; the matrix product of its parts is one, too."""
    layer, x = torch.nn.Linear(3, 4), torch.ones(2, 5, 3)
    with context(), LaunchCounter(CPU) as counter:
        torch.nn.functional.layer_norm(layer(x), (4,)).chunk(2, dim=-1)
    assert counter.kernels == 2


def test_reading_a_value_is_a_wait() -> None:
    x = torch.ones(3)
    with LaunchCounter(CPU) as counter:
        assert float(x.sum()) == 3.0
        x.nonzero()
    assert (counter.kernels, counter.syncs) == (3, 2)


def test_only_the_device_counts() -> None:
    with LaunchCounter(META) as counter:
        _ = torch.ones(3) + torch.ones(3)
        assert counter.kernels == 0
        x = torch.ones(3).to(META)
        x.cos()
    assert (counter.kernels, counter.syncs) == (2, 0)


def test_benchmark_with_tiny_models(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(BENCHMARK))["main"](["--size", "tiny"])
    rows = re.findall(r"^\| (.*) \| (\d+) \| \**([\d.]+)\** \|(?: (\d+))? \|$", capsys.readouterr().out, re.MULTILINE)
    assert len(rows) == 9
    (_, first, _, _), *_ = rows
    for name, kernels, ratio, syncs in rows:
        assert float(ratio) == pytest.approx(int(kernels) / int(first), abs=0.02)
        # The loss and the norm of the gradients, because training stops if one is not finite.
        expected = "" if name.startswith("of which") else "2" if name.startswith("training") else "0"
        assert syncs == expected, name
