"""Text and conditions per frame in the packed engine, against the plain sampler."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_text import WIDTH, encoded

from ardiff.diffusion.config import DiffusionConfig
from ardiff.dit import DiT, DiTConfig
from ardiff.sampling.config import EngineConfig
from ardiff.sampling.engine import EngineLimitError, SamplingEngine
from ardiff.sampling.full import stream_request
from ardiff.sampling.params import FrameCondition, expand_params, validate
from ardiff.sampling.request import EncodedPrompt, SampleRequest

STEPS = 6
DIFFUSION = DiffusionConfig()
CHANGES = [
    FrameCondition(frame=3, prompt="a square moves"),
    FrameCondition(frame=7, class_label=2, guidance_scale=3.0),
    FrameCondition(frame=9, prompt=""),
]


def make_model(dtype: torch.dtype = torch.float64, **changes: Any) -> DiT:
    settings = {"num_frames": 8, "num_tokens": 3, "width": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    config = DiTConfig(**{**settings, "condition": "cross_attention", "condition_dim": WIDTH, **changes})
    generator, model = torch.Generator().manual_seed(0), DiT(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.15, generator=generator)
    return model.to(dtype).eval()


def make_request(condition: torch.Tensor | None = None, **changes: Any) -> SampleRequest:
    given = 0 if condition is None else condition.shape[1]
    settings = {"prompt": "a red ring", "num_frames": 6, "ar_step": 2, "num_inference_steps": STEPS, "solver": "ddim"}
    videos = tuple(expand_params(**{**settings, "given_frames": given, **changes}))
    texts = dict.fromkeys(text for video in videos for text in video.texts)
    return SampleRequest(videos=videos, condition=condition, prompts=encoded(*texts))


def full(model: DiT, request: SampleRequest) -> torch.Tensor:
    videos = tuple(replace(video, mode="full") for video in request.videos)
    return torch.cat(list(stream_request(model, DIFFUSION, replace(request, videos=videos), 8)), dim=1)


def given_latents(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(2, 2, 3, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))


SETTINGS: list[dict[str, Any]] = [
    {},
    {"num_frames": 1, "ar_step": 0},
    {"num_frames": 20, "ar_step": 1, "guidance_scale": 2.0},
    {"num_frames": 20, "ar_step": 3, "guidance_scale": 2.0, "negative_prompt": ["a blue disc that stands", ""]},
    {"num_frames": 20, "ar_step": 2, "sink_frames": 2, "window_stride": 3, "conditions": CHANGES},
    {"num_frames": 20, "ar_step": 2, "solver": "dpmpp_2m", "guidance_scale": 2.0, "conditions": CHANGES},
    {"num_frames": 8, "ar_step": 0, "solver": "unipc", "conditions": [CHANGES[:1], CHANGES[1:2]]},
    {"num_frames": 20, "ar_step": 2, "guidance_scale": 2.0, "sink_frames": 4, "conditions": CHANGES[2:]},
]


@pytest.mark.parametrize(("settings", "given"), [*((s, False) for s in SETTINGS), *((s, True) for s in SETTINGS[3:5])])
def test_window_equals_full(settings: dict[str, Any], given: bool) -> None:
    check_window(settings, given, torch.float64, 1e-10, "ragged")


@pytest.mark.parametrize("attention", ["ragged", "masked", "stacked", "flex"])
@pytest.mark.parametrize("number", [3, 4])
def test_window_equals_full_in_float32(attention: Any, number: int) -> None:
    check_window(SETTINGS[number], False, torch.float32, 1e-5, attention)


def check_window(settings: dict[str, Any], given: bool, dtype: torch.dtype, tolerance: float, attention: Any) -> None:
    model = make_model(dtype)
    videos = {"prompt": ["a red ring", "a green square moves up"], "seed": [0, 1], "class_label": [0, None]}
    request = make_request(given_latents(dtype) if given else None, **{**videos, **settings})
    engine = SamplingEngine(model, DIFFUSION, EngineConfig(attention_backend=attention))
    assert (engine.run(request) - full(model, request)).abs().max() < tolerance


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("ar_step", [0, 2, STEPS])
def test_rolling_equals_one_pass_under_the_band_mask(guidance: float, ar_step: int) -> None:
    short, whole = make_model(attention_window=5), make_model(num_frames=20, attention_window=5)
    request = make_request(
        num_frames=20,
        ar_step=ar_step,
        guidance_scale=guidance,
        mode="rolling",
        conditions=CHANGES,
        negative_prompt="a disc",
        prompt=["a red ring", "a green square moves up"],
        seed=[0, 1],
    )
    assert (SamplingEngine(short, DIFFUSION).run(request) - full(whole, request)).abs().max() < 1e-10


@pytest.mark.parametrize("backend", ["packed", "plain"])
def test_backends_equal_full(backend: Any) -> None:
    model = make_model(torch.float32)
    request = make_request(num_frames=12, guidance_scale=2.0, conditions=CHANGES)
    engine = SamplingEngine(model, DIFFUSION, EngineConfig(backend=backend))
    assert (engine.run(request) - full(model, request)).abs().max() < 1e-5


@pytest.mark.slow
def test_the_compiled_backend_equals_full() -> None:
    model = make_model(torch.float32)
    request = make_request(num_frames=12, guidance_scale=2.0, conditions=CHANGES)
    engine = SamplingEngine(model, DIFFUSION, EngineConfig(backend="compiled"))
    assert (engine.run(request) - full(model, request)).abs().max() < 1e-5


def drain(engine: SamplingEngine, requests: list[SampleRequest]) -> list[torch.Tensor]:
    """The frames of requests of which one joins at each iteration."""
    names: dict[int, int] = {}
    frames: dict[int, list[torch.Tensor]] = {}
    waiting = list(enumerate(requests))
    while waiting or engine.busy:
        if waiting:
            number, request = waiting.pop(0)
            names[engine.submit(request)] = number
        for event in engine.step():
            frames.setdefault(names[event.request_id], []).append(event.latents)
    return [torch.cat(frames[number], dim=1) for number in range(len(requests))]


def test_packed_requests_with_different_prompts_equal_each_alone() -> None:
    model = make_model()
    requests = [
        make_request(),
        make_request(prompt="a green square moves up", num_frames=12, guidance_scale=2.0, negative_prompt="a disc"),
        make_request(prompt=["a red ring", None], seed=[3, 4], num_frames=8, ar_step=0, conditions=CHANGES[:2]),
        make_request(prompt=None, class_label=1, num_frames=3, ar_step=STEPS),
    ]
    alone = [SamplingEngine(model, DIFFUSION).run(request) for request in requests]
    for result, expected in zip(drain(SamplingEngine(model, DIFFUSION), requests), alone, strict=True):
        assert torch.allclose(result, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", ["window", "rolling", "full"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize(
    "change",
    [{"prompt": "a much longer text about a square"}, {"prompt": ""}, {"class_label": 2}, {"guidance_scale": 4.0}],
)
def test_frames_before_a_change_keep_their_bits(mode: Any, guidance: float, change: dict[str, Any]) -> None:
    if guidance == 1.0 and "guidance_scale" in change:
        return  # such a run evaluates a branch more
    model = make_model(torch.float32, attention_window=6)
    settings = {"num_frames": 14, "mode": mode, "guidance_scale": guidance, "class_label": 0, "seed": [0, 1]}
    plain = make_request(**settings)
    changed = make_request(**settings, conditions=[(9, change)])
    if mode == "full":
        before, after = full(model, plain), full(model, changed)
    else:
        before, after = (SamplingEngine(model, DIFFUSION).run(request) for request in (plain, changed))
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] != after[:, 9:]).flatten(2).any(dim=-1).all()


def test_packed_frames_before_a_change_keep_their_bits() -> None:
    model = make_model(torch.float32)
    other = make_request(prompt="a green square moves up", num_frames=20, guidance_scale=2.0)
    plain = make_request(num_frames=14, seed=5)
    changed = make_request(num_frames=14, seed=5, conditions=[(9, "a much longer text about a square")])
    before, after = (drain(SamplingEngine(model, DIFFUSION), [other, request]) for request in (plain, changed))
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1][:, :9], after[1][:, :9])
    assert not torch.equal(before[1][:, 9:], after[1][:, 9:])


def test_a_change_at_frame_0_is_the_condition_of_the_video() -> None:
    model = make_model(torch.float32)
    engine = SamplingEngine(model, DIFFUSION)
    plain = engine.run(make_request(prompt="a square", class_label=1))
    assert torch.equal(plain, engine.run(make_request(conditions=[(0, {"prompt": "a square", "class_label": 1})])))
    assert not torch.equal(plain, engine.run(make_request(class_label=1)))


def test_keys_and_values_are_computed_once_and_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = make_model(torch.float32), []
    compute = model.text_keys_values
    monkeypatch.setattr(model, "text_keys_values", lambda states: calls.append(states) or compute(states))
    engine = SamplingEngine(model, DIFFUSION)
    requests = [make_request(seed=s, guidance_scale=2.0, num_frames=12) for s in range(3)]
    drain(engine, [*requests, make_request(prompt="a square moves", num_frames=12, conditions=CHANGES)])
    assert len(calls) == 3  # two prompts and no text
    assert sum(states is None for states in calls) == 1


def test_prompts_count_as_memory_and_are_shared() -> None:
    model = make_model(torch.float32)
    engine = SamplingEngine(model, DIFFUSION)
    token = 2 * 2 * 32 * 4  # keys and values of two blocks of width 32
    none, ring, twice = (make_request(prompt=p) for p in (None, "a red ring", ["a red ring", "a red ring"]))
    changes = make_request(conditions=CHANGES[:1])
    sizes = {name: engine.num_bytes([r]) for name, r in [("none", none), ("ring", ring), ("changes", changes)]}
    assert sizes["ring"] - sizes["none"] == 2 * token  # three tokens instead of the one of no text
    assert sizes["changes"] - sizes["ring"] == 3 * token
    assert engine.num_bytes([ring, ring]) - 2 * sizes["ring"] == -(3 * token + table_bytes(model))
    assert engine.num_bytes([twice]) - 2 * sizes["ring"] == -(3 * token + table_bytes(model))
    tight = SamplingEngine(model, DIFFUSION, EngineConfig(max_cache_bytes=sizes["ring"]))
    for prompt in ("a red ring", "a red disc", "a red square"):
        tight.run(make_request(prompt=prompt))
        assert len(tight._shared.prompts) == len(tight._shared.tables) == 1  # no room for one that nobody uses
    with pytest.raises(EngineLimitError, match="MiB"):
        tight.submit(make_request(prompt="a red ring and more"))


def table_bytes(model: DiT) -> int:
    return STEPS * model.modulation_width * 4


def test_tables_of_prompts_are_bounded() -> None:
    engine = SamplingEngine(make_model(torch.float32), DIFFUSION)
    for number in range(40):
        engine.run(make_request(prompt=f"ring number {number}", num_frames=1, ar_step=0, num_inference_steps=1))
    assert len(engine._shared.prompts) <= 18


def test_a_prompt_that_is_not_encoded() -> None:
    engine, request = SamplingEngine(make_model(torch.float32), DIFFUSION), make_request()
    with pytest.raises(ValueError, match="'a red ring' is not encoded"):
        engine.submit(replace(request, prompts={}))
    with pytest.raises(ValueError, match="must be 5 wide, got 6"):
        engine.submit(replace(request, prompts={"a red ring": EncodedPrompt.of(torch.zeros(2, 6))}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"negative_prompt": "a disc"}, "set guidance_scale above 1"),
        ({"conditions": [(6, "a disc")]}, "must be between 0 and 5"),
        ({"conditions": [(3, "a disc"), (3, "a ring")]}, "must increase"),
        ({"conditions": [FrameCondition(frame=3)]}, "frame 3 changes nothing"),
        ({"conditions": [(3, {"class_label": 3})]}, "class_label 3 is out of range"),
        ({"conditions": [(3, {"guidance_scale": float("nan")})]}, "guidance_scale must be a finite number"),
        ({"prompt": "x" * 10_001}, "at most 10000 characters, got 10001"),
    ],
)
def test_bad_texts_and_conditions(changes: dict[str, Any], message: str) -> None:
    engine = SamplingEngine(make_model(torch.float32), DIFFUSION)
    [params] = expand_params(**{"num_frames": 6, "num_inference_steps": STEPS, **changes})
    with pytest.raises(ValueError, match=message):
        validate(params, engine.info)


def test_a_model_without_text_refuses_prompts() -> None:
    engine = SamplingEngine(make_model(torch.float32, condition="modulation"), DIFFUSION)
    for name, value in (("prompt", "a ring"), ("negative_prompt", "a ring"), ("conditions", [(2, "a ring")])):
        [params] = expand_params(num_inference_steps=STEPS, guidance_scale=2.0, **{name: value})
        with pytest.raises(ValueError, match=f"takes no text: leave {name} out"):
            validate(params, engine.info)
    [params] = expand_params(num_inference_steps=STEPS, prompt="", conditions=[(2, {"class_label": 1})])
    validate(params, engine.info)


def test_forms_of_conditions() -> None:
    expected = (FrameCondition(frame=0, prompt="a"), FrameCondition(frame=4, prompt="b", guidance_scale=2.0))
    for form in (
        list(expected),
        [(0, "a"), [4, {"prompt": "b", "guidance_scale": 2.0}]],
        [{"frame": 0, "prompt": "a"}, {"frame": 4, "prompt": "b", "guidance_scale": 2.0}],
    ):
        assert [p.conditions for p in expand_params(conditions=form, seed=[0, 1])] == [expected] * 2
    of_videos = expand_params(conditions=[[(0, "a")], []], prompt=["x", "y"])
    assert [(p.prompt, p.conditions) for p in of_videos] == [("x", expected[:1]), ("y", ())]
    for wrong in ([5], ["a"], [{"frames": 3}], [(3, 4)], [(1, 2, 3)]):
        with pytest.raises(ValueError, match="is no condition: give a mapping of frame, prompt"):
            expand_params(conditions=wrong)


def test_the_condition_of_each_frame() -> None:
    [params] = expand_params(prompt="a", class_label=1, guidance_scale=2.0, conditions=CHANGES)
    found = [params.condition_of(frame) for frame in (0, 2, 3, 8, 9, 100)]
    assert [c.prompt for c in found] == ["a", "a", "a square moves", "a square moves", "", ""]
    assert [c.class_label for c in found] == [1, 1, 1, 2, 2, 2]
    assert [c.guidance_scale for c in found] == [2.0, 2.0, 2.0, 3.0, 3.0, 3.0]
    assert params.texts == ("a", "a square moves")
    assert not replace(params, guidance_scale=1.0, conditions=()).guided
    assert replace(params, guidance_scale=1.0).guided


def test_texts_go_into_names_as_hashes() -> None:
    settings = [{"prompt": "a/b"}, {"prompt": "x" * 500}, {"conditions": [(3, "c")]}, {"negative_prompt": "d"}]
    tags = [tag for changes in settings for params in expand_params(**changes) for tag in params.tags()]
    assert len(set(tags)) == 4
    assert all(len(tag) < 24 and tag.replace("-", "").isalnum() for tag in tags)
    pairs = itertools.pairwise([tag.rpartition("-")[0] for tag in tags])
    assert list(pairs) == [("prompt", "prompt"), ("prompt", "conditions"), ("conditions", "negative")]
