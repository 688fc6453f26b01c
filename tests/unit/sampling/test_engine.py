"""The packed engine against the plain full sampler, which evaluates everything and remembers nothing."""

import gc
import itertools
import re
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ardiff.diffusion.ad import ad_schedule
from ardiff.diffusion.ar_step import smallest_ar_step
from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.guidance import guided_denoiser
from ardiff.diffusion.sampler import initial_noise, sample_full
from ardiff.dit import DiT, DiTConfig
from ardiff.sampling.cache import FrameCache
from ardiff.sampling.config import EngineConfig
from ardiff.sampling.cost import frame_evaluations
from ardiff.sampling.engine import EngineLimitError, SamplingEngine
from ardiff.sampling.params import SamplingParams, expand_params
from ardiff.sampling.request import SampleRequest

STEPS = 8
DIFFUSION = DiffusionConfig()


def make_model(dtype: torch.dtype = torch.float64, **changes: object) -> DiT:
    settings = {"num_frames": 16, "num_tokens": 3, "width": 32, "depth": 2, "num_heads": 2, "num_classes": 3, **changes}
    generator = torch.Generator().manual_seed(0)
    model = DiT(DiTConfig(**settings))  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.data.normal_(std=0.15, generator=generator)
    return model.to(dtype).eval()


def make_request(condition: torch.Tensor | None = None, **changes: Any) -> SampleRequest:
    given = 0 if condition is None else condition.shape[1]
    settings = {"class_label": 0, "num_frames": 6, "ar_step": 2, "num_inference_steps": STEPS, "solver": "ddim"}
    settings["given_frames"] = given
    return SampleRequest(videos=tuple(expand_params(**{**settings, **changes})), condition=condition)


def reference(model: DiT, request: SampleRequest, window: int | None) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    params, videos = request.params, request.videos
    seeds, labels = [video.seed for video in videos], torch.tensor([video.class_label for video in videos])
    noise = initial_noise(seeds, params.num_frames, model.config.num_tokens, model.config.token_dim)
    denoise = guided_denoiser(model, DIFFUSION, labels, params.guidance_scale)
    ar_step = params.resolved_ar_step
    schedule = ad_schedule(params.num_frames, params.num_inference_steps, ar_step, window, params.given_frames)
    return sample_full(denoise, noise.to(dtype), schedule, DIFFUSION, request.condition)


def cases() -> list[tuple[int, int, int, float, int]]:
    found = []
    for frames, batch, guidance, given in itertools.product((1, 8, 20), (1, 3), (1.0, 2.0), (0, 3)):
        smallest = smallest_ar_step(frames, STEPS, 8)
        steps = sorted({s for s in (smallest, 2, 5, STEPS // 2, STEPS) if s >= smallest})
        found += [(frames, batch, step, guidance, given) for step in steps if given < frames]
    return found


@pytest.mark.parametrize(("frames", "batch", "ar_step", "guidance", "given"), cases())
def test_engine_equals_full_sampler(frames: int, batch: int, ar_step: int, guidance: float, given: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model = make_model(dtype, num_frames=8)
        condition = None
        if given:
            condition = torch.randn(batch, given, 3, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))
        request = make_request(
            class_label=[i % 3 for i in range(batch)],
            seed=list(range(batch)),
            num_frames=frames,
            ar_step=ar_step,
            guidance_scale=guidance,
            condition=condition,
        )
        engine = SamplingEngine(model, DIFFUSION)
        result, expected = engine.run(request), reference(model, request, window=8)
        assert (result - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))
        if frames <= 8:
            fills = frames - 1 if ar_step else given
            assert engine.frame_evaluations == batch * ((frames - given) * STEPS + fills)


@pytest.mark.parametrize("backend", ["ragged", "masked", "stacked", "flex"])
@pytest.mark.parametrize(
    "changes",
    [
        {"positions": "sincos"},
        {"attention_window": 5},
        {"depth": 1},
    ],
)
def test_attention_backends_and_model_variants(backend: str, changes: dict[str, object]) -> None:
    model = make_model(**changes)
    for frames, ar_step in ((16, 3), (24, 1)):
        request = make_request(num_frames=frames, ar_step=ar_step, guidance_scale=1.5)
        result = SamplingEngine(model, DIFFUSION, EngineConfig(attention_backend=backend)).run(request)  # type: ignore[arg-type]
        assert (result - reference(model, request, window=16)).abs().max() < 1e-12


class Operations(TorchDispatchMode):
    """Notes each operation with the shapes that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [tuple(a.shape) for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        self.seen.append(f"{func} {shapes}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("frames", "ar_step", "mode"), [(16, 3, "window"), (40, 3, "window"), (40, 3, "rolling")])
def test_shapes_depend_on_the_number_of_evaluated_frames_alone(frames: int, ar_step: int, mode: str) -> None:
    """And nothing is read back from the device within a pass: what a CUDA graph for each number needs."""
    changes = {"attention_window": 16} if mode == "rolling" else {}
    config = EngineConfig(attention_backend="stacked", backend="plain")
    engine = SamplingEngine(make_model(torch.float32, **changes), DIFFUSION, config)
    engine.submit(make_request(num_frames=frames, ar_step=ar_step, guidance_scale=2.0, mode=mode))
    passes: dict[int, list[list[str]]] = {}
    forward = engine._model.forward_frames

    def record(latents: torch.Tensor, *rest: Any) -> torch.Tensor:
        with Operations() as operations:
            output = forward(latents, *rest)
        passes.setdefault(len(latents), []).append(operations.seen)
        return output

    engine._model.forward_frames = record  # type: ignore[method-assign]
    while engine.busy:
        engine.step()
    assert max(len(same) for same in passes.values()) > 5
    for same in passes.values():
        assert all(operations == same[0] for operations in same)
    everything = "".join(operation for same in passes.values() for operation in same[0])
    assert not re.search("_local_scalar_dense|nonzero|masked_select", everything)


@pytest.mark.parametrize("execution", ["plain", "packed", pytest.param("compiled", marks=pytest.mark.slow)])
def test_ways_to_execute_the_model(execution: str) -> None:
    model = make_model(torch.float32)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = EngineConfig(backend=execution)  # type: ignore[arg-type]
    for frames, ar_step in ((16, 3), (24, 1)):
        request = make_request(num_frames=frames, ar_step=ar_step, guidance_scale=1.5)
        result = SamplingEngine(model, DIFFUSION, config).run(request)
        assert (result - reference(model, request, window=16)).abs().max() < 1e-5
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_packing_is_refused_where_it_does_not_exist() -> None:
    with pytest.raises(ValueError, match="only float32 weights"):
        SamplingEngine(make_model(torch.float64), DIFFUSION, EngineConfig(backend="packed"))


@pytest.mark.parametrize("attention", ["auto", "stacked"])
def test_bfloat16_weights_stay_close(attention: Any) -> None:
    """Latents are float32 between iterations; 8 steps of bfloat16 arithmetic leave a percent or two."""
    model, request = make_model(torch.float32), make_request(num_frames=16)
    expected = reference(model, request, window=16)
    config = EngineConfig(attention_backend=attention)
    result = SamplingEngine(model.to(torch.bfloat16), DIFFUSION, config).run(request)
    assert result.dtype == torch.float32
    assert ((result - expected).norm() / expected.norm()) < 0.05


def test_finished_latents_are_ordinary_tensors() -> None:
    result = SamplingEngine(make_model(torch.float32), DIFFUSION).run(make_request())
    assert not result.is_inference()


@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
def test_prediction_targets(prediction: str) -> None:
    model, diffusion = make_model(), DiffusionConfig(prediction=prediction)  # type: ignore[arg-type]
    request = make_request(num_frames=5)
    noise = initial_noise([0], 5, 3, 4).double()
    denoise = guided_denoiser(model, diffusion, torch.tensor([0]), 1.0)
    expected = sample_full(denoise, noise, ad_schedule(5, STEPS, 2), diffusion)
    assert torch.allclose(SamplingEngine(model, diffusion).run(request), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["ragged", "masked", "stacked", "flex"])
@pytest.mark.parametrize("ar_step", [0, 1, 2, STEPS])
def test_rolling_equals_one_pass_under_the_band_mask(backend: str, ar_step: int) -> None:
    short, whole = make_model(num_frames=8, attention_window=5), make_model(num_frames=24, attention_window=5)
    condition = torch.randn(2, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for given in (None, condition):
        request = make_request(
            class_label=[0, 1],
            seed=[0, 1],
            num_frames=24,
            ar_step=ar_step,
            guidance_scale=2.0,
            mode="rolling",
            condition=given,
        )
        engine = SamplingEngine(short, DIFFUSION, EngineConfig(attention_backend=backend))  # type: ignore[arg-type]
        result = engine.run(request)
        assert (result - reference(whole, request, window=None)).abs().max() < 1e-12
        if given is None:
            assert engine.frame_evaluations == 2 * (24 * STEPS + (23 if ar_step else 0))


def test_published_evaluation_counts() -> None:
    """The tables of the method notes: F=16, S=50, and F=128 with a window of 16. ``test_cost.py`` shows that
    ``frame_evaluations`` is what the engine evaluates; the longest schedules take it from there."""
    model = make_model(torch.float32, num_tokens=1, width=8, depth=1, num_heads=1, attention_window=16)

    def count(**settings: object) -> int:
        engine = SamplingEngine(model, DIFFUSION)
        engine.run(make_request(num_inference_steps=50, **settings))
        return engine.frame_evaluations

    assert [count(num_frames=16, ar_step=s) for s in (0, 5, 10, 25, 50)] == [800, 815, 815, 815, 815]
    assert count(num_frames=128, ar_step=5) == 7087
    long = SamplingParams(num_frames=128, num_inference_steps=50)
    predicted = [frame_evaluations(replace(long, ar_step=s), 16) for s in (5, 10, 25, 50)]
    assert predicted == [7087, 7647, 7983, 8095]
    assert frame_evaluations(replace(long, ar_step=25, mode="rolling"), 16) == 6527


@pytest.mark.parametrize("attention", ["ragged", "masked", "stacked", "flex"])
def test_packed_requests_equal_each_alone(attention: Any) -> None:
    model = make_model()
    requests = [
        make_request(num_frames=6, ar_step=2),
        make_request(num_frames=3, ar_step=STEPS, guidance_scale=3.0, seed=7, class_label=2),
        make_request(num_frames=20, ar_step=1, seed=[1, 2], class_label=[0, 1]),
        make_request(num_frames=9, ar_step=0, num_inference_steps=5, seed=4),
        make_request(num_frames=5, condition=torch.ones(1, 2, 3, 4, dtype=torch.float64)),
    ]
    alone = [SamplingEngine(model, DIFFUSION).run(request) for request in requests]
    engine = SamplingEngine(model, DIFFUSION, EngineConfig(max_requests=3, attention_backend=attention))
    results: dict[int, list[torch.Tensor]] = {}
    waiting = list(enumerate(requests))
    names = {}
    while waiting or engine.busy:
        if waiting:  # one joins at each iteration, while others are in the middle
            number, request = waiting.pop(0)
            names[engine.submit(request)] = number
        for event in engine.step():
            assert event.first_frame == sum(p.shape[1] for p in results.setdefault(names[event.request_id], [])) + (
                2 if names[event.request_id] == 4 else 0
            )
            results[names[event.request_id]].append(event.latents)
    for number, expected in enumerate(alone):
        got = torch.cat(results[number], dim=1)
        assert torch.allclose(got, expected[:, -got.shape[1] :], rtol=0, atol=1e-12), number


def test_frames_come_as_soon_as_they_are_final() -> None:
    engine = SamplingEngine(make_model(torch.float32), DIFFUSION)
    engine.submit(make_request(num_frames=5, ar_step=3))
    arrivals, iteration = [], 0
    while engine.busy:
        iteration += 1
        arrivals += [(iteration, event.first_frame, event.done) for event in engine.step()]
    assert arrivals == [(STEPS + 3 * f, f, f == 4) for f in range(5)]


def test_cancel_frees_the_place_at_the_next_iteration() -> None:
    engine = SamplingEngine(make_model(torch.float32), DIFFUSION, EngineConfig(max_requests=1))
    first, second = engine.submit(make_request()), engine.submit(make_request(seed=5))
    engine.step()
    assert engine.cancel(first)
    assert not engine.cancel(first)
    events = [event for _ in range(50) if engine.busy for event in engine.step()]
    assert {event.request_id for event in events} == {second}
    assert events[-1].done


@pytest.mark.parametrize("backend", ["ragged", "masked", "stacked", "flex"])
@pytest.mark.parametrize("ends", ["done", "cancelled"])
def test_memory_is_free_at_once(backend: str, ends: str) -> None:
    """Keys and values, and the engine itself, are freed by reference counts, without the garbage collector."""
    engine = SamplingEngine(make_model(), DIFFUSION, EngineConfig(attention_backend=backend))  # type: ignore[arg-type]
    request_id = engine.submit(make_request())
    engine.step()
    references = [weakref.ref(engine), weakref.ref(engine._running[request_id].cache)]
    gc.disable()
    try:
        if ends == "done":
            while engine.busy:
                engine.step()
        else:
            engine.cancel(request_id)
        assert references[1]() is None
        del engine
        assert references[0]() is None
    finally:
        gc.enable()


def test_limits_are_errors_before_any_work() -> None:
    model = make_model(torch.float32)
    engine = SamplingEngine(model, DIFFUSION, EngineConfig(max_frames=10, max_requests=1, max_waiting=1))
    with pytest.raises(EngineLimitError, match="limit of 10 frames"):
        engine.submit(make_request(num_frames=11))
    engine.submit(make_request())
    engine.submit(make_request())
    with pytest.raises(EngineLimitError, match="wait already"):
        engine.submit(make_request())
    tight = SamplingEngine(model, DIFFUSION, EngineConfig(max_cache_bytes=1000))
    with pytest.raises(EngineLimitError, match="MiB"):
        tight.submit(make_request())
    assert engine.frame_evaluations == 0


def test_cache_limit_makes_requests_wait() -> None:
    model = make_model(torch.float32)
    one = SamplingEngine(model, DIFFUSION).num_bytes([make_request()])
    engine = SamplingEngine(model, DIFFUSION, EngineConfig(max_cache_bytes=one))
    ids = [engine.submit(make_request(seed=i)) for i in range(3)]
    done = []
    while engine.busy:
        events = engine.step()
        assert len(engine.iterations) <= 1
        done += [event.request_id for event in events if event.done]
    assert done == ids


def test_tables_count_as_memory_and_are_shared() -> None:
    model = make_model(torch.float32)
    table = STEPS * model.modulations(torch.zeros(1), torch.zeros(1, dtype=torch.int64)).nbytes
    engine = SamplingEngine(model, DIFFUSION)
    alone, pair, guided = (
        make_request(),
        make_request(class_label=[0, 1], seed=[0, 1]),
        make_request(guidance_scale=2.0),
    )
    caches = engine.num_bytes([alone]) - table
    assert caches == FrameCache.num_bytes(model.config, 1, 6, torch.float32)
    assert engine.num_bytes([pair]) == engine.num_bytes([guided]) == 2 * (caches + table)
    assert engine.num_bytes([alone, alone]) == 2 * caches + table
    tight = SamplingEngine(model, DIFFUSION, EngineConfig(max_cache_bytes=engine.num_bytes([alone])))
    for label in (0, 1, 2):
        tight.run(make_request(class_label=label))
        assert len(tight._shared.tables) == 1  # there is no room for one that nobody uses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ar_step": 9}, "smallest valid ar_step is 0"),
        ({"num_frames": 100, "ar_step": 0}, "smallest valid ar_step is 1"),
        ({"class_label": 4}, "class_label 4 is out of range"),
        ({"num_inference_steps": 1001, "ar_step": 1000}, "num_inference_steps"),
        ({"condition": torch.zeros(1, 6, 3, 4)}, "nothing to generate"),
        ({"condition": torch.zeros(1, 2, 3, 5)}, "condition must be"),
        ({"num_frames": 17, "mode": "rolling"}, "attention_window"),
        ({"mode": "full"}, "the engine takes mode=window and mode=rolling"),
    ],
)
def test_bad_requests(changes: dict[str, object], message: str) -> None:
    engine = SamplingEngine(make_model(torch.float32), DIFFUSION)
    with pytest.raises(ValueError, match=message):
        engine.submit(make_request(**changes))
    assert not engine.busy


def test_videos_of_a_request_share_all_but_class_and_seed() -> None:
    first, second = make_request(), make_request(ar_step=1)
    with pytest.raises(ValueError, match="may differ in class_label, prompt, negative_prompt, conditions, seed only"):
        SampleRequest(videos=(*first.videos, *second.videos))
    with pytest.raises(ValueError, match="at least one video"):
        SampleRequest(videos=())


def test_rolling_needs_rotary_positions() -> None:
    engine = SamplingEngine(make_model(torch.float32, positions="sincos", attention_window=4), DIFFUSION)
    with pytest.raises(ValueError, match="rotary"):
        engine.submit(make_request(num_frames=17, mode="rolling"))


@pytest.mark.parametrize("mode", ["window", "rolling"])
def test_memory_does_not_grow_with_the_video(mode: str) -> None:
    """Counts what the engine keeps alive: tensors of latents and caches, after 60 and after 600 frames."""
    model = make_model(torch.float32, num_tokens=1, width=8, depth=1, num_heads=1, num_frames=8, attention_window=8)
    engine = SamplingEngine(model, DIFFUSION)
    engine.submit(make_request(num_frames=700, ar_step=2, mode=mode))
    sizes, frames = {}, 0
    while engine.busy:
        for event in engine.step():
            frames += event.latents.shape[1]
        if frames in (60, 600) and frames not in sizes:
            gc.collect()
            state = next(iter(engine._running.values()))
            sizes[frames] = (len(state.frames), sum(keys.numel() for keys in state.cache.keys))
    assert frames == 700
    assert sizes[60] == sizes[600]
