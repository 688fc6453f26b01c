"""The formulas of memory and traffic against what two workers under real ZeRO hold and send."""

import gc
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_workers

from ardiff import distributed
from ardiff.config import build
from ardiff.dit import DiT, DiTConfig
from ardiff.train.config import TrainConfig
from ardiff.train.engines.factory import make_engine
from ardiff.train.estimate.zero import bucket_bytes, exchanged_bytes, state_bytes

PARTS = 3
CASES = [(stage, precision) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]
SIZES = DiTConfig(num_frames=2, num_tokens=2, token_dim=4, width=64, depth=3, num_heads=2, num_classes=4)
# Weights are gathered anew for every pass, as those of a model that is larger than what ZeRO 3 keeps at hand.
GATHER = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 1, "stage3_max_reuse_distance": 1}
BUCKET = 100_000
# What a worker of n sends of a payload, in payloads times (n - 1) / n, in ring collectives.
RING = {"all_reduce": 2, "reduce_scatter_tensor": 1, "all_gather_into_tensor": 1}


def live_bytes() -> int:
    """Bytes of all live tensors."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}.values()
    )


def count_payloads() -> Counter[str]:
    """Counts the bytes of each kind of collective from now on."""
    counts = Counter[str]()

    def wrap(name: str) -> None:
        real = getattr(dist, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            tensors = [v for v in [*arguments, *options.values()] if isinstance(v, torch.Tensor)]
            counts[name] += max(t.numel() * t.element_size() for t in tensors)
            return real(*arguments, **options)

        setattr(dist, name, counted)

    for name in (*RING, "reduce", "all_gather", "all_to_all_single"):
        wrap(name)
    return counts


def measure(folder: Path) -> None:
    """Measures an update of three passes under every stage: peak bytes between passes, and bytes sent."""
    payloads, found = count_payloads(), {}
    latents, zeros = torch.randn(2, 2, 2, 4), torch.zeros(2, 2, dtype=torch.int64)
    for stage, precision in CASES:
        raw = {"zero_optimization": {"reduce_bucket_size": BUCKET, **(GATHER if stage == 3 else {})}}
        deepspeed = {"stage": stage, "raw": raw}
        tree = {"num_workers": 2, "batch_size": 12, "gradient_accumulation": PARTS, "precision": precision}
        before = live_bytes()
        model = DiT(SIZES)
        parameters = sum(p.numel() for p in model.parameters())
        engine = make_engine(
            model, build(TrainConfig, {**tree, "engine": "deepspeed", "deepspeed": deepspeed}), torch.device("cpu")
        )
        held = 0
        for step in range(2):  # what the first update makes for good is not of an update
            payloads.clear()
            for _ in range(PARTS):
                loss = engine.compute(lambda m=model: m(latents, zeros, zeros[:, 0]).float().square().mean())  # type: ignore[misc]
                engine.backward(loss / PARTS)
                del loss
                held = max(held, live_bytes() - before) if step else 0
            engine.step(step, 1.0)
        found[f"{stage} {precision}"] = {"parameters": parameters, "held": held, "payloads": dict(payloads)}
        del model, engine
    if distributed.rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("costs")
    run_workers(2, measure, folder)
    result: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return result


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_memory(found: dict[str, Any], stage: int, precision: str) -> None:
    case = found[f"{stage} {precision}"]
    bucket = bucket_bytes(stage, precision, BUCKET) if stage != 2 else 0  # there stage 2 has freed it
    expected = state_bytes(case["parameters"], stage, 2, precision) + bucket
    assert case["held"] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_traffic(found: dict[str, Any], stage: int, precision: str) -> None:
    case = found[f"{stage} {precision}"]
    assert set(case["payloads"]) <= set(RING)
    sent = sum(RING[name] * payload / 2 for name, payload in case["payloads"].items())
    assert sent == pytest.approx(exchanged_bytes(case["parameters"], stage, 2, precision, PARTS), rel=0.05)
