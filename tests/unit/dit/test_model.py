"""The AR-DiT: what may influence what, to the last bit."""

import pytest
import torch

from ardiff.dit import DiT, DiTConfig
from ardiff.dit.attention import after_condition, block_causal_mask, masked_attention

FRAMES = 8
TOKENS = {"condition": "tokens", "condition_tokens": 3, "condition_dim": 5}
VARIANTS = [
    {},
    {"positions": "sincos"},
    {"attention_window": 3},
    {"positions": "sincos", "attention_window": 2},
    {"residual": "normed"},
    {"final_norm": "plain", "guidance_null": "first_class"},
    {"positions": "sincos", "attention_window": 2, **TOKENS},
    {"positions": "table", "residual": "normed", "final_norm": "plain", **TOKENS},
]


def inputs(model: DiT, frames: int = FRAMES, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, frames, model.config.num_tokens, model.config.token_dim, generator=generator)
    timesteps = torch.randint(1000, (batch, frames), generator=generator)
    return latents, timesteps, torch.arange(batch) % (model.config.num_classes + 1)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_later_frame_changes_no_earlier_output(make_dit, variant, train):
    model = make_dit(**variant).train(train)
    latents, timesteps, labels = inputs(model)
    expected = model(latents, timesteps, labels)
    for j in range(FRAMES):
        other, later = latents.clone(), timesteps.clone()
        other[:, j] += 3.0
        later[:, j] = (later[:, j] + 400) % 1000
        for changed in (model(other, timesteps, labels), model(latents, later, labels)):
            assert torch.equal(changed[:, :j], expected[:, :j])
            assert (changed[:, j] != expected[:, j]).any(dim=(-2, -1)).all()
            if j + 1 < FRAMES:
                assert not torch.equal(changed[:, j + 1], expected[:, j + 1])


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_gradient_flows_from_earlier_outputs_to_later_inputs(make_dit, variant, train):
    model = make_dit(**variant).train(train)
    latents, timesteps, labels = inputs(model)
    for j in (1, 4, FRAMES - 1):
        leaf = latents.clone().requires_grad_()
        model(leaf, timesteps, labels)[:, :j].square().sum().backward()
        assert leaf.grad is not None
        assert not leaf.grad[:, j:].any()
        assert leaf.grad[:, j - 1].any()


@pytest.mark.parametrize("positions", ["rotary", "sincos"])
@pytest.mark.parametrize(("window", "depth"), [(1, 1), (3, 1), (2, 3), (3, 2)])
def test_the_band_bounds_how_far_a_frame_reaches(make_dit, positions, window, depth):
    """One block reaches ``window - 1`` frames on, so all of them ``depth * (window - 1)``."""
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
    latents, timesteps, labels = inputs(model)
    whole = model(latents, timesteps, labels)
    for frames in (1, 3, 7):
        part = model(latents[:, :frames], timesteps[:, :frames], labels)
        assert torch.allclose(part, whole[:, :frames], rtol=1e-4, atol=1e-5)


def test_videos_of_a_batch_do_not_meet(make_dit):
    model = make_dit()
    latents, timesteps, labels = inputs(model, batch=3)
    expected = model(latents, timesteps, labels)
    other = latents.clone()
    other[1] += 1.0
    changed = model(other, timesteps, labels)
    assert torch.equal(changed[[0, 2]], expected[[0, 2]])
    assert not torch.equal(changed[1], expected[1])


def test_rotary_depends_on_differences_of_positions_only(make_dit):
    """What the rolling executor needs: frames 100.. are what frames 0.. are."""
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


def test_modulations_of_packed_frames_are_those_of_each_alone(make_dit):
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


def test_what_condition_tokens_see(make_dit):
    """With ``all``, frames see later ones, in the second block at the earliest; the mask says who sees whom."""
    leaks = {}
    for depth in (1, 2):
        for attention in ("self", "all"):
            model = make_dit(depth=depth, positions="table", condition_attention=attention, **TOKENS)
            latents, timesteps, labels = inputs(model)
            other = latents.clone()
            other[:, -1] += 3.0
            outputs = [model(x, timesteps, labels)[:, :-1] for x in (latents, other)]
            leaks[depth, attention] = not torch.equal(*outputs)
    assert leaks == {(1, "self"): False, (1, "all"): False, (2, "self"): False, (2, "all"): True}
    mask = block_causal_mask(2, 1)
    assert after_condition(mask, 1, "self").int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert after_condition(mask, 1, "all").int().tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 1]]


def test_what_no_class_is(make_dit):
    """Three ways to say "no class" in guidance, and what a video without a class is then."""
    settings = {"positions": "sincos", **TOKENS}
    learned, zero, first = (make_dit(guidance_null=null, **settings) for null in ("learned", "zero", "first_class"))
    assert [(m.null_class, m.unlabelled) for m in (learned, zero, first)] == [(3, 3), (4, 3), (0, 0)]
    latents, timesteps, _ = inputs(learned)

    def give(model: DiT, label: int) -> torch.Tensor:
        return model(latents, timesteps, torch.tensor([label, label]))

    assert torch.equal(give(learned, 3), give(zero, 3))
    assert torch.equal(give(first, 0), give(zero, 0))
    assert torch.equal(give(zero, 4), zero(latents, timesteps, torch.zeros(2, 3, 5)))
    assert not torch.allclose(give(zero, 4), give(zero, 3))
    for label in range(4):
        tokens = zero.condition.table[[label, label]]
        assert torch.equal(give(zero, label), zero(latents, timesteps, tokens))
    with pytest.raises(ValueError, match="not trained with condition tokens"):
        make_dit()(latents, timesteps, torch.zeros(2, 3, 5))


def test_a_normed_residual_forgets_the_scale_of_its_input(make_dit):
    """Norms overwrite the residual: what enters the first block matters up to shift and scale only."""
    for residual, same in (("normed", True), ("plain", False)):
        model = make_dit(residual=residual).double()
        latents, timesteps, labels = inputs(model)
        before = model(latents.double(), timesteps, labels)
        for parameter in (*model.token_in.parameters(), model.position_embedding):
            parameter.data *= 100.0
        assert torch.allclose(model(latents.double(), timesteps, labels), before, rtol=1e-3, atol=1e-3) == same


def test_a_plain_final_norm_has_no_modulation(make_dit):
    model = make_dit(final_norm="plain")
    assert "final_modulation.weight" not in model.state_dict()
    assert model.modulations(torch.tensor([1]), torch.tensor([0])).shape == (1, 6 * 16 * 2)
    latents, timesteps, labels = inputs(model)
    for block in model.blocks:
        for parameter in block.modulation.parameters():
            parameter.data.zero_()
    assert torch.equal(model(latents, timesteps, labels), model(latents, timesteps // 2, labels))


def test_positions_in_a_table_begin_as_the_fixed_ones(make_dit):
    sizes = {"num_frames": FRAMES, "num_tokens": 2, "width": 16, "depth": 1, "num_heads": 2}
    fixed, table = DiT(DiTConfig(positions="sincos", **sizes)), DiT(DiTConfig(positions="table", **sizes))
    assert torch.equal(fixed.position_embedding, table.position_embedding)
    assert set(table.state_dict()) - set(fixed.state_dict()) == {"position_embedding"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_model_predicts_zero(variant):
    model = DiT(DiTConfig(num_frames=FRAMES, num_tokens=2, width=16, depth=2, num_heads=2, num_classes=3, **variant))
    assert not model(*inputs(model)).any()
    for block in model.blocks:
        assert not block.modulation.weight.any()
        assert block.attention.qkv.weight.any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_every_parameter(make_dit, variant):
    model = make_dit(**variant).train()
    latents, timesteps, labels = inputs(model, batch=4)
    model(latents, timesteps, labels).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


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
        assert DiT(model.config).config == model.config


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
        ({"attention_window": 4, "attention": "bidirectional"}, "leave it out with attention=bidirectional"),
        ({"condition": "tokens", "positions": "sincos", "condition_tokens": -1}, "condition_tokens must be 0 or more"),
        ({"condition_dim": 0}, "condition_dim at least 1"),
        ({"condition": "tokens"}, "needs positions=sincos or table"),
        ({"condition_tokens": 3}, "for condition=tokens only"),
        ({"condition_attention": "all"}, "for condition=tokens only"),
        ({"guidance_null": "zero"}, "for condition=tokens only"),
        ({"guidance_null": "first_class"}, "needs a model with classes"),
    ],
)
def test_impossible_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig(**changes)
