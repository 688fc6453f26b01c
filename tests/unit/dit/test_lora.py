"""ardiff.dit.lora: an adapter that starts at nothing, leaves the model's weights alone and merges exactly."""

from typing import Any

import pytest
import torch

from ardiff.dit.config import LoRAConfig
from ardiff.dit.lora import LoRALinear, add_lora, merged
from ardiff.errors import CheckpointError

KINDS: dict[str, dict[str, Any]] = {
    "classes": {},
    "text": {"condition": "cross_attention", "condition_dim": 5},
    "upstream": {"kind": "upstream", "condition_tokens": 3, "condition_dim": 5},
}


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 5, 2, 4, generator=generator, dtype=torch.float64)
    return latents, torch.randint(1000, (2, 5), generator=generator), torch.tensor([0, 2])


def train(model: torch.nn.Module) -> None:
    """Fills the matrices that start at zero."""
    for number, parameter in enumerate(p for n, p in model.named_parameters() if "lora_B" in n):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_at_nothing_and_merges_exactly(make_dit, kind: str) -> None:
    """The unmerged and the merged model agree up to the rounding of updates, which are computed in float32."""
    config = LoRAConfig(rank=3, alpha=7.0, layers=("qkv", "proj", "fc1", "fc2", "modulation"))
    model, adapted = (make_dit(**KINDS[kind]).double() for _ in range(2))
    add_lora(adapted, config)
    adapted.double()
    before = model(*inputs())
    assert torch.equal(adapted(*inputs()), before)
    train(adapted)
    after = adapted(*inputs())
    assert (after - before).abs().max() > 0.01
    adapter = {name: p for name, p in adapted.named_parameters() if ".lora_" in name}
    changed = merged(dict(model.named_parameters()), adapter, config.scale)
    assert len(changed) == len(adapter) // 2
    # Updates are computed in float32, which is what weights are stored in.
    model.load_state_dict(changed, strict=False)
    assert torch.allclose(model(*inputs()), after, rtol=0, atol=1e-5)


def test_only_the_adapter_is_trained(make_dit) -> None:
    model = make_dit(depth=2)
    total = sum(p.numel() for p in model.parameters())
    add_lora(model, LoRAConfig(rank=2, layers=("qkv", "fc2")))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    layers = {name.rpartition(".lora_")[0] for name in trained}
    assert layers == {f"blocks.{i}.{name}" for i in range(2) for name in ("attention.qkv", "mlp.fc2")}
    assert all(".lora_" in name for name in trained)
    assert sum(p.numel() for p in model.parameters()) == total + sum(p.numel() for p in trained.values())
    assert not any(isinstance(m, LoRALinear) for n, m in model.named_modules() if not n.startswith("blocks."))


def test_attention_to_text_has_layers_of_its_own(make_dit) -> None:
    model = make_dit(**KINDS["text"])
    add_lora(model, LoRAConfig(rank=2, layers=("q", "kv")))
    adapted = {name.partition(".text_attention.")[2] for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    assert adapted == {"q", "kv"}


def test_layers_that_the_model_lacks(make_dit) -> None:
    with pytest.raises(CheckpointError, match="no linear layer named q, kv"):
        add_lora(make_dit(), LoRAConfig(rank=2, layers=("q", "kv")))


def test_an_adapter_of_another_model(make_dit) -> None:
    adapted = make_dit()
    add_lora(adapted, LoRAConfig(rank=2))
    adapter = {name: p for name, p in adapted.named_parameters() if ".lora_" in name}
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attention\.qkv\.weight is \(\d+, \d+\) in the adapter"):
        merged(dict(make_dit(width=32).named_parameters()), adapter, 1.0)
    with pytest.raises(CheckpointError, match="missing in the model"):
        merged({}, adapter, 1.0)


@pytest.mark.parametrize(
    ("settings", "message"), [({"rank": -1}, "rank"), ({"alpha": 0.0}, "alpha"), ({"layers": ()}, "layers")]
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**settings)
