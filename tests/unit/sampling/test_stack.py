"""Requests that share one attention call: what they cost together, and which memory they hold."""

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ardiff.diffusion.config import DiffusionConfig
from ardiff.dit import DiT, DiTConfig
from ardiff.gpu_check.launches import LaunchCounter
from ardiff.sampling.config import EngineConfig
from ardiff.sampling.cost import sequential_passes
from ardiff.sampling.engine import SamplingEngine
from ardiff.sampling.params import SamplingParams
from ardiff.sampling.request import SampleRequest

DIFFUSION = DiffusionConfig()
PARAMS = SamplingParams(class_label=0, num_frames=8, num_inference_steps=8, ar_step=3, solver="ddim")


def make_engine(depth: int = 2, dtype: torch.dtype = torch.float64) -> SamplingEngine:
    sizes: dict[str, Any] = {"num_frames": 8, "num_tokens": 3, "width": 32, "num_heads": 2, "num_classes": 3}
    model, generator = DiT(DiTConfig(depth=depth, **sizes)), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.15, generator=generator)
    config = EngineConfig(attention_backend="stacked", backend="plain")
    return SamplingEngine(model.to(dtype).eval(), DIFFUSION, config)


def make_request(videos: int = 1, **changes: Any) -> SampleRequest:
    params = replace(PARAMS, **changes)
    return SampleRequest(videos=tuple(replace(params, seed=seed) for seed in range(videos)))


def held_bytes(engine: SamplingEngine) -> int:
    """Memory of the keys and values that running requests hold, of which they may see a part only."""
    caches = [state.cache for state in engine._running.values()]
    tensors: list[Tensor] = [tensor for cache in caches for tensor in (*cache.keys, *cache.values)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def cache_bytes(requests: list[SampleRequest]) -> int:
    engine = make_engine()
    return engine.num_bytes(requests) - engine._shared.num_bytes(requests)


def kernels_of_an_iteration(depth: int, requests: list[SampleRequest]) -> int:
    engine = make_engine(depth)
    for request in requests:  # each joins in the next iteration, so all are at different steps
        engine.submit(request)
        engine.step()
    for _ in range(6):
        engine.step()
    with LaunchCounter(torch.device("cpu")) as counter:
        engine.step()
    return counter.kernels


def test_a_block_launches_the_same_kernels_for_any_number_of_requests() -> None:
    of_block = [
        kernels_of_an_iteration(3, requests) - kernels_of_an_iteration(2, requests)
        for requests in ([make_request()], [make_request(2, guidance_scale=2.0)], [make_request()] * 5)
    ]
    assert of_block[0] == of_block[1] == of_block[2] > 10


def test_a_further_request_costs_few_kernels() -> None:
    few, many = (kernels_of_an_iteration(2, [make_request()] * count) for count in (2, 6))
    assert (many - few) / 4 < 20


@pytest.mark.parametrize("ends", ["done", "cancelled"])
def test_requests_hold_the_memory_that_is_accounted_for(ends: str) -> None:
    engine = make_engine()
    requests = [make_request(3, num_frames=2), make_request(), make_request(2, guidance_scale=2.0)]
    requests += [make_request(num_frames=5), make_request(num_frames=12)]
    ids = [engine.submit(request) for request in requests]
    engine.step()
    assert held_bytes(engine) == cache_bytes(requests)
    if ends == "done":
        while ids[0] in engine.iterations:
            engine.step()
    else:
        assert engine.cancel(ids[0])
        engine.step()
    assert held_bytes(engine) == cache_bytes(requests[1:])
    engine.cancel(ids[2])
    engine.step()
    assert held_bytes(engine) == cache_bytes([requests[1], *requests[3:]])


@pytest.mark.parametrize("change", ["joins", "is done", "is cancelled"])
def test_caches_are_joined_one_layer_at_a_time(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """So when a request joins or ends, keys or values of one layer is all that is needed beside the caches."""
    engine = make_engine(depth=3)
    requests = [make_request(num_inference_steps=6), make_request(), make_request()]
    ids = [engine.submit(request) for request in requests[: 2 if change == "joins" else 3]]
    iterations = sequential_passes(requests[0].params) - 1 if change == "is done" else 1
    for _ in range(iterations):
        engine.step()
    shape, peaks, joined = (2, PARAMS.num_frames * 3, 16), list[int](), torch.cat  # (H, R L, K)

    def cat(tensors: Any, *rest: Any, **options: Any) -> Tensor:
        result = joined(tensors, *rest, **options)
        if tensors[0].shape[1:] == shape:
            alive = [t.untyped_storage() for t in gc.get_objects() if type(t) is Tensor and t.shape[1:] == shape]
            sizes = {storage.data_ptr(): storage.nbytes() for storage in alive}
            peaks.append(sum(sizes.values()) // tensors[0][:1].nbytes)
        return result

    monkeypatch.setattr(torch, "cat", cat)
    match change:
        case "joins":
            engine.submit(requests[2])
            engine.step()
        case "is done":
            engine.step()
        case "is cancelled":
            engine.cancel(ids[0])
            assert not peaks
            engine.step()
    # Keys and values of 3 requests in 3 layers, and one layer of all that are together now.
    assert max(peaks) <= 3 * 2 * 3 + (3 if change == "joins" else 2)
    assert len(peaks) == 2 * 3


def test_cancelling_after_a_failure_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """When memory has run out, joining the caches of the others again would fail, too."""
    engine = make_engine()
    ids = [engine.submit(make_request(seed=seed)) for seed in range(3)]
    engine.step()

    def fail(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as without_memory:
        without_memory.setattr(torch, "cat", fail)
        with pytest.raises(torch.OutOfMemoryError):
            engine.step()
        assert all(engine.cancel(request_id) for request_id in ids)
    assert not held_bytes(engine)
    assert not engine.busy
    expected = make_engine().run(make_request())
    assert torch.equal(engine.run(make_request()), expected)
