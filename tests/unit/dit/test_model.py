"""The AR-DiT: which inputs an output depends on, bitwise, and what its configuration allows."""

from typing import Any

import pytest
import torch

from ardiff.config import build
from ardiff.dit import DiT, DiTConfig, TextTokens
from ardiff.dit.attention import block_causal_mask, masked_attention, prepend_condition
from ardiff.models import AnyDiTConfig
from ardiff.models import make_dit as new_dit

FRAMES = 8
TOKENS = {"condition_tokens": 3, "condition_dim": 5}
VARIANTS = [
    {},
    {"positions": "sincos"},
    {"attention_window": 3},
    {"positions": "sincos", "attention_window": 2},
    {"condition": "tokens", "positions": "sincos", "attention_window": 2, **TOKENS},
    {"kind": "upstream", "condition_attention": "self", **TOKENS},
    {"condition": "cross_attention", "condition_dim": 5},
    {"condition": "cross_attention", "condition_dim": 5, "positions": "sincos", "attention_window": 2},
]


def texts(index: torch.Tensor, prompts: int = 3, tokens: int = 4) -> TextTokens:
    """Prompts of 1, 2, ... tokens, padded with values that must not matter."""
    states = torch.randn(prompts, tokens, 5, generator=torch.Generator().manual_seed(2))
    return TextTokens(states, torch.arange(tokens) <= torch.arange(prompts)[:, None], index)


def inputs(model: DiT, frames: int = FRAMES, batch: int = 2) -> tuple[Any, ...]:
    """Latents, timesteps, labels and, for a model with text, prompts, one of which is no text."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, frames, model.config.num_tokens, model.config.token_dim, generator=generator)
    timesteps = torch.randint(1000, (batch, frames), generator=generator)
    labels = torch.arange(batch) % (model.config.num_classes + 1)
    text = (texts(torch.arange(batch) - 1),) if model.config.text else ()
    return latents, timesteps, labels, *text


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_later_frame_changes_no_earlier_output(make_dit, variant, train):
    model = make_dit(**variant).train(train)
    latents, timesteps, *condition = inputs(model)
    expected = model(latents, timesteps, *condition)
    for j in range(FRAMES):
        other, later = latents.clone(), timesteps.clone()
        other[:, j] += 3.0
        later[:, j] = (later[:, j] + 400) % 1000
        for changed in (model(other, timesteps, *condition), model(latents, later, *condition)):
            assert torch.equal(changed[:, :j], expected[:, :j])
            assert (changed[:, j] != expected[:, j]).any(dim=(-2, -1)).all()
            if j + 1 < FRAMES:
                assert not torch.equal(changed[:, j + 1], expected[:, j + 1])


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_gradient_flows_from_earlier_outputs_to_later_inputs(make_dit, variant, train):
    model = make_dit(**variant).train(train)
    latents, timesteps, *condition = inputs(model)
    for j in (1, 4, FRAMES - 1):
        leaf = latents.clone().requires_grad_()
        model(leaf, timesteps, *condition)[:, :j].square().sum().backward()
        assert leaf.grad is not None
        assert not leaf.grad[:, j:].any()
        assert leaf.grad[:, j - 1].any()


@pytest.mark.parametrize("positions", ["rotary", "sincos"])
@pytest.mark.parametrize(("window", "depth"), [(1, 1), (3, 1), (2, 3), (3, 2)])
def test_the_attention_window_bounds_how_far_a_frame_reaches(make_dit, positions, window, depth):
    """One block passes a change on by ``window - 1`` frames, so all blocks by ``depth * (window - 1)``."""
    model = make_dit(positions=positions, attention_window=window, depth=depth)
    latents, timesteps, labels = inputs(model)
    expected, reach = model(latents, timesteps, labels), depth * (window - 1)
    for j in range(FRAMES):
        other = latents.clone()
        other[:, j] += 3.0
        changed = (model(other, timesteps, labels) != expected).any(dim=(0, 2, 3))
        assert changed.tolist() == [j <= f <= j + reach for f in range(FRAMES)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_fewer_frames_give_the_same_outputs(make_dit, variant):
    model = make_dit(**variant)
    latents, timesteps, *condition = inputs(model)
    whole = model(latents, timesteps, *condition)
    for frames in (1, 3, 7):
        part = model(latents[:, :frames], timesteps[:, :frames], *condition)
        assert torch.allclose(part, whole[:, :frames], rtol=1e-4, atol=1e-5)


def test_videos_of_a_batch_are_independent(make_dit):
    model = make_dit()
    latents, timesteps, labels = inputs(model, batch=3)
    expected = model(latents, timesteps, labels)
    other = latents.clone()
    other[1] += 1.0
    changed = model(other, timesteps, labels)
    assert torch.equal(changed[[0, 2]], expected[[0, 2]])
    assert not torch.equal(changed[1], expected[1])


def test_rotary_depends_on_differences_of_positions_only(make_dit):
    """What mode=rolling needs: frames 100.. give the same output as frames 0.."""
    model = make_dit().double()
    latents, timesteps, labels = inputs(model, batch=1)
    attend = [masked_attention(model.mask, FRAMES)] * model.config.depth
    frames, modulations = latents[0].double(), model.modulations(timesteps[0], labels.expand(FRAMES))
    near = model.forward_frames(frames, modulations, torch.arange(FRAMES), attend)
    far = model.forward_frames(frames, modulations, torch.arange(FRAMES) + 100, attend)
    spread = model.forward_frames(frames, modulations, torch.arange(FRAMES) * 5, attend)
    assert torch.allclose(near, far, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(near, spread, rtol=1e-3, atol=1e-3)


def test_the_order_of_frames_matters_with_both_kinds_of_positions(make_dit):
    for positions in ("rotary", "sincos"):
        model = make_dit(positions=positions)
        latents, _, labels = inputs(model)
        timesteps = torch.full((2, FRAMES), 500)
        swapped = latents[:, [1, 0, *range(2, FRAMES)]]
        last = model(latents, timesteps, labels)[:, -1]
        assert not torch.allclose(model(swapped, timesteps, labels)[:, -1], last, rtol=1e-3, atol=1e-3)


def test_masks() -> None:
    assert block_causal_mask(2, 2).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert block_causal_mask(3, 1, window=2).int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert torch.equal(block_causal_mask(4, 3, window=4), block_causal_mask(4, 3))


def test_class_and_timestep_matter(make_dit):
    model = make_dit()
    latents, timesteps, _ = inputs(model)
    outputs = [model(latents, timesteps, torch.tensor([c, c])) for c in range(4)]
    assert model.null_class == 3
    for i in range(4):
        for j in range(i):
            assert not torch.allclose(outputs[i], outputs[j], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(model(latents, timesteps // 2, torch.tensor([0, 0])), outputs[0], rtol=1e-3, atol=1e-3)


def test_modulations_of_packed_frames_equal_those_of_each_frame_alone(make_dit):
    model = make_dit().double()
    timesteps, labels = torch.tensor([0, 7, 999]), torch.tensor([0, 3, 1])
    together = model.modulations(timesteps, labels)
    assert together.shape == (3, 6 * 16 * 2 + 2 * 16)
    alone = torch.cat([model.modulations(timesteps[i : i + 1], labels[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("positions", ["rotary", "sincos"])
def test_with_bidirectional_attention_frames_see_later_ones(make_dit, positions):
    model = make_dit(attention="bidirectional", positions=positions)
    latents, timesteps, labels = inputs(model)
    before = model(latents, timesteps, labels)
    changed = latents.clone()
    changed[:, -1] += 1.0
    after = model(changed, timesteps, labels)
    assert all(not torch.allclose(after[:, i], before[:, i]) for i in range(FRAMES))
    one, other = (make_dit(positions=positions, depth=1, attention=a) for a in ("causal", "bidirectional"))
    assert torch.allclose(one(latents, timesteps, labels)[:, -1], other(latents, timesteps, labels)[:, -1], atol=1e-5)


def test_masks_with_condition_tokens() -> None:
    mask = prepend_condition(block_causal_mask(2, 1), 1)
    assert mask.int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_condition_tokens_of_a_class_or_of_the_caller(make_dit) -> None:
    model = make_dit(condition="tokens", positions="sincos", **TOKENS)
    latents, timesteps, _ = inputs(model)
    assert (model.null_class, model.unlabelled) == (3, 3)
    outputs = [model(latents, timesteps, torch.tensor([label, label])) for label in range(4)]
    for label, output in enumerate(outputs):
        assert torch.equal(output, model(latents, timesteps, model.condition.table[[label, label]]))
        assert all(not torch.allclose(output, other) for other in outputs[:label])
    with pytest.raises(ValueError, match=r"must be \(B, M, 5\)"):
        model(latents, timesteps, torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="not trained with condition tokens"):
        make_dit()(latents, timesteps, torch.zeros(2, 3, 5))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_model_predicts_zero(variant):
    sizes = {"num_frames": FRAMES, "num_tokens": 2, "width": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = new_dit(build(AnyDiTConfig, {**sizes, **variant}))
    assert not model(*inputs(model)).any()
    for block in model.blocks:
        assert not block.modulation.weight.any()
        assert block.attention.qkv.weight.any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_every_parameter(make_dit, variant):
    model = make_dit(**variant).train()
    model(*inputs(model, batch=4)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_video_reads_its_own_prompt_and_no_padding(make_dit):
    model = make_dit(condition="cross_attention", condition_dim=5).double()
    latents, timesteps, labels, _ = inputs(model, batch=4)
    latents, text = latents.double(), texts(torch.tensor([0, -1, 2, 0]))
    output = model(latents, timesteps, labels, text)
    for video, prompt in enumerate([0, -1, 2, 0]):
        one = slice(video, video + 1)
        alone = None
        if prompt >= 0:
            only = text.states[[prompt], : prompt + 1], text.mask[[prompt], : prompt + 1]  # without padding
            alone = TextTokens(*only, torch.tensor([0]))
        expected = model(latents[one], timesteps[one], labels[one], alone)
        assert torch.allclose(output[one], expected, rtol=1e-10, atol=1e-10)
        other = model(latents[one], timesteps[one], labels[one], texts(torch.tensor([1])))
        assert not torch.allclose(other, expected, rtol=1e-3, atol=1e-3)


def test_a_condition_per_frame_acts_from_its_frame_on(make_dit):
    model = make_dit(condition="cross_attention", condition_dim=5)
    latents, timesteps, *_ = inputs(model)
    labels, prompts = torch.zeros(2, FRAMES, dtype=torch.int64), torch.zeros(2, FRAMES, dtype=torch.int64)
    expected = model(latents, timesteps, labels, texts(prompts))
    of_videos = model(latents, timesteps, labels[:, 0], texts(prompts[:, 0]))
    assert torch.allclose(expected, of_videos, rtol=1e-5, atol=1e-5)
    later = torch.arange(FRAMES) >= 5
    for changed in (
        model(latents, timesteps, labels, texts(torch.where(later, 2, prompts))),
        model(latents, timesteps, torch.where(later, 1, labels), texts(prompts)),
    ):
        assert torch.equal(changed[:, :5], expected[:, :5])
        assert (changed[:, 5:] != expected[:, 5:]).any(dim=(-2, -1)).all()


def test_the_text_layers_of_a_new_model_add_nothing(make_dit):
    """A new model computes what its blocks without text compute, whatever the text."""
    sizes = {"num_frames": FRAMES, "num_tokens": 2, "width": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    model, plain = new_dit(DiTConfig(**sizes, condition="cross_attention", condition_dim=5)), make_dit()
    assert not any(block.text_attention.proj.weight.any() for block in model.blocks)
    model.load_state_dict(plain.state_dict(), strict=False)
    latents, timesteps, labels, text = inputs(model)
    assert torch.equal(model(latents, timesteps, labels, text), plain(latents, timesteps, labels))


def test_text_of_the_wrong_kind(make_dit):
    model = make_dit(condition="cross_attention", condition_dim=4)
    with pytest.raises(ValueError, match=r"must be token states \(P, M, 4\), got \(3, 4, 5\)"):
        model(*inputs(model))
    plain = make_dit()
    with pytest.raises(ValueError, match="takes no text"):
        plain(*inputs(plain), texts(torch.tensor([0, 0])))


def test_too_many_frames(make_dit):
    model = make_dit()
    with pytest.raises(ValueError, match="at most 8 frames at once, got 9"):
        model(*inputs(model, frames=9))


def test_size_of_the_paper() -> None:
    """Table 6 says 673 M. The weights exist on the meta device only."""
    with torch.device("meta"):
        model = DiT(DiTConfig())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(673.7e6, abs=0.5e6)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_the_model_holds_its_configuration_and_nothing_but_weights(make_dit):
    for variant in VARIANTS:
        model = make_dit(**variant)
        assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
        assert new_dit(model.config).config == model.config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 30, "num_heads": 4}, "even multiple of num_heads"),
        ({"width": 12, "num_heads": 4}, "even multiple of num_heads"),
        ({"width": 8, "num_heads": 4}, "at least 4 wide"),
        ({"num_heads": 0}, "at least 1"),
        ({"num_frames": 0}, "at least 1"),
        ({"num_tokens": 0}, "at least 1"),
        ({"token_dim": 0}, "at least 1"),
        ({"depth": 0}, "at least 1"),
        ({"num_classes": -1}, "num_classes must be 0 or more"),
        ({"attention_window": 0}, r"attention_window must be in 1\.\.num_frames \(16\)"),
        ({"attention_window": 17}, r"attention_window must be in 1\.\.num_frames \(16\)"),
        ({"attention_window": 4, "attention": "bidirectional"}, "unset it with attention=bidirectional"),
        ({"condition": "tokens", "positions": "sincos", "condition_tokens": -1}, "condition_tokens must be 0 or more"),
        ({"condition_dim": 0}, "condition_dim at least 1"),
        ({"condition": "tokens"}, "needs positions=sincos"),
        ({"condition_tokens": 3}, "for condition=tokens only"),
    ],
)
def test_impossible_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig(**changes)


def test_the_shape_of_frames_is_a_condition(make_dit):
    model, plain = make_dit(num_shapes=3), make_dit()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters()) + 3 * 16
    timesteps = torch.full((9,), 500)
    classes, shapes = torch.arange(9) % 3, torch.arange(9) // 3
    labels = model.label(classes, shapes)
    assert len(set(labels.tolist())) == 9
    modulations = model.modulations(timesteps, labels)
    assert len(torch.unique(modulations.round(decimals=4), dim=0)) == 9
    with torch.no_grad():
        model.shape_embedding.weight.zero_()
        assert torch.equal(model.modulations(timesteps, labels), model.modulations(timesteps, classes))
    assert model.without_class(labels).tolist() == model.label(torch.full((9,), model.null_class), shapes).tolist()
    assert plain.without_class(classes).tolist() == [plain.null_class] * 9


def test_condition_tokens_take_frames_of_one_shape() -> None:
    with pytest.raises(ValueError, match="one shape only"):
        DiTConfig(num_shapes=2, condition="tokens", condition_tokens=2, positions="sincos")
    with pytest.raises(ValueError, match="at least 1"):
        DiTConfig(num_shapes=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_teacher_forcing_shows_a_noisy_frame_the_clean_frames_before_it(make_dit, variant):
    """Each noisy frame equals that of a clip of its own, whose other frames are clean."""
    model = make_dit(**variant).double()
    noisy, timesteps, *condition = inputs(model)
    noisy, generator = noisy.double(), torch.Generator().manual_seed(7)
    clean = torch.randn(noisy.shape, generator=generator, dtype=torch.float64)
    levels = torch.cat([torch.ones_like(timesteps), timesteps], dim=1)
    output = model(torch.cat([clean, noisy], dim=1), levels, *condition, teacher_forcing=True)
    assert output.shape == noisy.shape
    for frame in range(FRAMES):
        clip = torch.cat([clean[:, :frame], noisy[:, frame : frame + 1]], dim=1)
        own = torch.cat([levels[:, :frame], timesteps[:, frame : frame + 1]], dim=1)
        assert torch.allclose(output[:, frame], model(clip, own, *condition)[:, frame], rtol=0, atol=1e-12)


def test_teacher_forcing_needs_a_causal_model_and_room_for_the_clip(make_dit):
    latents, timesteps, labels = inputs(make_dit(), 2 * FRAMES)
    with pytest.raises(ValueError, match="no frame sees a later one"):
        make_dit(attention="bidirectional")(latents, timesteps, labels, teacher_forcing=True)
    with pytest.raises(ValueError, match="sees at most 4 frames at once, got 8"):
        make_dit(num_frames=4)(latents, timesteps, labels, teacher_forcing=True)
