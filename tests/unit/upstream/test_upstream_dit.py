"""What distinguishes the authors' AR-DiT from the standard one. Shared promises: tests/unit/dit/test_model.py."""

import pytest
import torch
from torch import Tensor, nn

from ardiff.config import build
from ardiff.dit import DiT
from ardiff.errors import ConfigError
from ardiff.models import AnyDiTConfig
from ardiff.upstream.config import UpstreamDiTConfig
from ardiff.upstream.dit import UpstreamDiT

TOKENS = {"kind": "upstream", "condition_tokens": 3, "condition_dim": 5}
SIZES = {"num_frames": 8, "num_tokens": 2, "width": 16, "depth": 2, "num_heads": 2, "num_classes": 3}


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 8, 2, 4, generator=generator)
    return latents, torch.randint(1000, (2, 8), generator=generator), torch.tensor([0, 1])


def test_the_kind_chooses_the_configuration() -> None:
    assert isinstance(build(AnyDiTConfig, {"kind": "upstream"}), UpstreamDiTConfig)
    assert not isinstance(build(AnyDiTConfig, {}), UpstreamDiTConfig)
    with pytest.raises(ConfigError, match="'kind' must be one of standard, upstream, not 'other'"):
        build(AnyDiTConfig, {"kind": "other"})
    with pytest.raises(ConfigError, match="Unknown configuration key 'guidance_null'"):
        build(AnyDiTConfig, {"guidance_null": "zero"})


def test_only_with_condition_attention_all_do_frames_see_later_ones(make_dit) -> None:
    """Condition tokens carry later frames to earlier ones from the second block on."""
    for depth, attention, leaks in ((1, "self", False), (1, "all", False), (2, "self", False), (2, "all", True)):
        model = make_dit(depth=depth, condition_attention=attention, **TOKENS)
        latents, timesteps, labels = inputs()
        other = latents.clone()
        other[:, -1] += 3.0
        outputs = [model(x, timesteps, labels)[:, :-1] for x in (latents, other)]
        assert torch.equal(*outputs) != leaks
        assert model.config.causal == (attention == "self")
    mask = model.condition_mask(torch.tensor([[True, False], [True, True]]), 1)
    assert mask.int().tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 1]]


def test_no_class_is_zero_tokens_or_class_0(make_dit) -> None:
    zero, first = (make_dit(guidance_null=null, **TOKENS) for null in ("zero", "first_class"))
    assert [(m.null_class, m.unlabelled) for m in (zero, first)] == [(4, 3), (0, 0)]
    latents, timesteps, _ = inputs()

    def output(model: DiT, label: int) -> Tensor:
        return model(latents, timesteps, torch.tensor([label, label]))

    assert torch.equal(output(first, 0), output(zero, 0))
    assert torch.equal(output(zero, 4), zero(latents, timesteps, torch.zeros(2, 3, 5)))
    assert not torch.allclose(output(zero, 4), output(zero, 3))
    for label in range(4):
        tokens = zero.condition.table[[label, label]]
        assert torch.equal(output(zero, label), zero(latents, timesteps, tokens))
    with pytest.raises(ValueError, match="needs a model with classes"):
        UpstreamDiTConfig(guidance_null="first_class")


def test_norms_replace_the_residual_stream(make_dit) -> None:
    """What enters the first block matters only up to shift and scale."""
    for kind, forgets in (("upstream", True), ("standard", False)):
        changes = {"condition": "tokens", "positions": "sincos", **TOKENS, "kind": kind}
        model = make_dit(**changes).double()
        latents, timesteps, labels = inputs()
        before = model(latents.double(), timesteps, labels)
        for parameter in (*model.token_in.parameters(), *model.condition.project.parameters()):
            parameter.data *= 100.0
        model.position_embedding.data *= 100.0
        assert torch.allclose(model(latents.double(), timesteps, labels), before, rtol=1e-3, atol=1e-3) == forgets


def test_the_final_norm_has_no_modulation(make_dit) -> None:
    model = make_dit(**TOKENS)
    assert not any(name.startswith("final_layer.modulation") for name in model.state_dict())
    assert model.modulations(torch.tensor([1])).shape == (1, 6 * 16 * 2)
    latents, timesteps, labels = inputs()
    for block in model.blocks:
        for parameter in block.modulation.parameters():
            parameter.data.zero_()
    assert torch.equal(model(latents, timesteps, labels), model(latents, timesteps // 2, labels))


def test_positions_are_weights_that_begin_as_the_fixed_ones() -> None:
    fixed = DiT(build(AnyDiTConfig, {"positions": "sincos", **SIZES}))
    table = UpstreamDiT(UpstreamDiTConfig(**SIZES))
    assert torch.equal(fixed.position_embedding, table.position_embedding)
    assert isinstance(table.position_embedding, nn.Parameter)
    assert "position_embedding" in table.state_dict()
