"""LPIPS: architecture by its public names, the formula, loading."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ardiff.errors import CheckpointError, DataError
from ardiff.metrics.networks.lpips import LPIPS, Backbone, load_lpips


def filled(backbone: Backbone) -> LPIPS:
    model, generator = LPIPS(backbone), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        if name.startswith("lin"):
            parameter.data.abs_()
    return model


def frames(seed: int) -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(
    ("backbone", "convolutions", "parameters"),
    [("vgg", (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), 14_714_688), ("alex", (0, 3, 6, 8, 10), 2_469_696)],
)
def test_names_and_sizes_are_the_public_ones(
    backbone: Backbone, convolutions: tuple[int, ...], parameters: int
) -> None:
    """Counts of the convolutions of torchvision's vgg16 and alexnet."""
    state = LPIPS(backbone).state_dict()
    expected = {f"features.{i}.{kind}" for i in convolutions for kind in ("weight", "bias")}
    assert set(state) == expected | {f"lin{i}.model.1.weight" for i in range(5)}
    assert sum(t.numel() for name, t in state.items() if name.startswith("features")) == parameters


@pytest.mark.parametrize("backbone", ["vgg", "alex"])
def test_it_is_the_weighted_distance_of_unit_features(backbone: Backbone) -> None:
    model, x, y = filled(backbone), frames(0), frames(1)
    expected = torch.zeros(2)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    a, b = ((f - shift[:, None, None]) / scale[:, None, None] for f in (x, y))
    tap = 0
    for i, layer in enumerate(model.features):
        a, b = layer(a), layer(b)
        if i in model.taps:
            unit = [f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (a, b)]
            weight = model.get_parameter(f"lin{tap}.model.1.weight")[0]
            expected += ((unit[0] - unit[1]).square() * weight).sum(1).mean((1, 2))
            tap += 1
    assert tap == 5
    assert torch.allclose(model(x, y), expected, rtol=1e-5)
    assert model(x, x).tolist() == [0.0, 0.0]


def test_gradients_reach_the_frames_alone_and_are_finite_for_flat_frames() -> None:
    model, x = filled("alex"), torch.zeros(1, 3, 32, 32, requires_grad=True)
    model(x, frames(0)[:1]).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    assert bool(x.grad.any())
    assert all(p.grad is None for p in model.parameters())


def test_loading_finds_the_backbone(tmp_path: Path) -> None:
    source = filled("alex")
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    assert torch.equal(load_lpips(str(tmp_path / "w.safetensors"))(frames(0), frames(1)), source(frames(0), frames(1)))


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none"):
        load_lpips(str(tmp_path / "none.safetensors"))
    (tmp_path / "damaged").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="Cannot read the weights"):
        load_lpips(str(tmp_path / "damaged"))
    save_file({"features.0.weight": torch.zeros(64, 3, 11, 11)}, tmp_path / "half")
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_lpips(str(tmp_path / "half"))


def test_unknown_backbone() -> None:
    with pytest.raises(ValueError, match="unknown backbone 'squeeze'"):
        LPIPS("squeeze")  # type: ignore[arg-type]
