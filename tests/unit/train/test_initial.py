"""Initial weights from an earlier stage."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ardiff.config import fingerprint
from ardiff.data.latents import LatentSet
from ardiff.dit import TextTokens
from ardiff.errors import CheckpointError
from ardiff.models import make_dit as build_dit
from ardiff.pretrained import save_autoencoder
from ardiff.resolution import Resolution
from ardiff.train.checkpoint import TrainState, save_checkpoint
from ardiff.train.config import OptimizerConfig
from ardiff.train.engines.torch_engine import TorchEngine
from ardiff.train.export import MODEL, describe_autoencoder
from ardiff.train.initial import initialise_autoencoder, initialise_dit, pruned
from ardiff.vae.blocks import interpolated_positions
from ardiff.vae.config import DiscriminatorConfig
from ardiff.vae.discriminator import PatchDiscriminator
from ray_jobs import train_dit, train_vae
from ray_jobs.training.config import TrainDiTConfig, TrainVAEConfig


def engine(model: torch.nn.Module) -> TorchEngine:
    return TorchEngine(model, OptimizerConfig(lr=0.1), torch.device("cpu"), ema_decay=0.9)


def same(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_from_a_model_and_from_a_pipeline(make_vae, make_pipeline, tmp_path: Path) -> None:
    save_autoencoder(str(tmp_path / "vae"), source := make_vae(seed=3))
    make_pipeline().save_pretrained(str(tmp_path / "pipeline"))
    for folder, expected in (("vae", source), ("pipeline", make_pipeline().vae)):
        model = make_vae(seed=5).train()
        initialise_autoencoder(str(tmp_path / folder), model)
        assert same(model, expected)
        assert model.training


def test_from_a_checkpoint_the_ema_and_the_discriminator(make_vae, tmp_path: Path) -> None:
    sizes = DiscriminatorConfig(width=4, depth=1)
    first, discriminator = engine(make_vae(seed=3)), engine(PatchDiscriminator(sizes))
    for each in (first, discriminator):
        for parameter in each.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        each.step(0, 1.0)
    save_checkpoint(tmp_path, first, TrainState(1, 2, "x"), discriminator)
    model, rival = make_vae(seed=5), PatchDiscriminator(sizes)
    initialise_autoencoder(str(tmp_path), model, rival)
    average = first.ema_weights()
    assert all(torch.equal(p, average[n]) for n, p in model.named_parameters())
    assert not same(model, first.model)
    assert same(rival, discriminator.model)


def test_the_job_starts_from_it(make_vae, tmp_path: Path) -> None:
    save_autoencoder(str(tmp_path), source := make_vae(seed=3))
    config = TrainVAEConfig(init_from=str(tmp_path), vae=source.config)
    assert same(train_vae.make_task(config, None).model, source)  # type: ignore[arg-type]
    assert not same(train_vae.make_task(replace(config, init_from=""), None).model, source)  # type: ignore[arg-type]


def test_an_ar_dit_from_a_pipeline(make_pipeline, make_dit, tmp_path: Path) -> None:
    source = make_pipeline(kind="upstream", condition_tokens=3, condition_dim=5)
    source.save_pretrained(str(tmp_path))
    latents = LatentSet("x", 8, 2, 4, ["a", "b", "c"], [], [], source.statistics, "")
    config = TrainDiTConfig(init_from=str(tmp_path), dit=source.dit.config)
    assert same(train_dit.make_task(config, latents).model, source.dit)
    assert not same(train_dit.make_task(replace(config, init_from=""), latents).model, source.dit)
    with pytest.raises(CheckpointError, match=r"class_embedding\.weight is missing in the file"):
        initialise_dit(str(tmp_path), make_dit(positions="sincos"))
    with pytest.raises(CheckpointError, match="There is no trained model"):
        initialise_dit(str(tmp_path / "nothing"), make_dit())
    assert fingerprint(TrainDiTConfig()) == fingerprint(TrainDiTConfig(init_from="")) != fingerprint(config)


def test_an_ar_dit_with_text_from_one_without(make_pipeline, make_dit, tmp_path: Path) -> None:
    """Equal outputs before the first step; text layers keep their new weights. Without classes: the null class."""
    inputs = torch.randn(2, 8, 2, 4), torch.randint(1000, (2, 8))
    text = TextTokens(torch.randn(2, 3, 5), torch.ones(2, 3, dtype=torch.bool), torch.tensor([0, 1]))
    for source_classes, classes in ((3, 3), (0, 0), (3, 0)):
        source = make_pipeline(num_classes=source_classes)
        source.save_pretrained(str(tmp_path))
        model = build_dit(replace(source.dit.config, num_classes=classes, condition="cross_attention", condition_dim=5))
        before = {name: p.detach().clone() for name, p in model.named_parameters() if "text_" in name}
        initialise_dit(str(tmp_path), model)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
        labels = torch.tensor([0, 1]) if classes else torch.zeros(2, dtype=torch.int64)
        expected = source.dit(*inputs, labels if classes else torch.full((2,), source.dit.null_class))
        assert torch.equal(model(*inputs, labels, text), expected)
    with pytest.raises(CheckpointError, match=r"class_embedding\.weight is"):
        initialise_dit(str(tmp_path), make_dit(num_classes=2, condition="cross_attention"))
    make_pipeline(condition="cross_attention", condition_dim=5).save_pretrained(str(tmp_path / "text"))
    with pytest.raises(CheckpointError, match="not a parameter of the model"):
        initialise_dit(str(tmp_path / "text"), make_dit())


def test_wider_latents_are_pruned_to_their_first_channels(make_vae, tmp_path: Path) -> None:
    """The pruned model encodes to the first channels, and decodes like the wide one with the others at zero."""
    wide, model = make_vae(seed=3, token_dim=12), make_vae(seed=5)
    save_autoencoder(str(tmp_path), wide)
    initialise_autoencoder(str(tmp_path), model)
    video = torch.rand(1, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    theirs, ours = wide.encode(video), model.encode(video)
    assert torch.allclose(ours.mean, theirs.mean[..., :4], atol=1e-6)
    assert torch.allclose(ours.log_variance, theirs.log_variance[..., :4], atol=1e-6)
    padded = torch.nn.functional.pad(ours.mean, (0, 8))
    assert torch.allclose(model.decode(ours.mean), wide.decode(padded), atol=1e-5)


def test_narrower_latents_are_not_widened(make_vae, tmp_path: Path) -> None:
    state = dict(make_vae(token_dim=2).named_parameters())
    assert pruned(state, 4) == state
    save_autoencoder(str(tmp_path), make_vae(token_dim=2))
    with pytest.raises(CheckpointError, match=r"decoder\.token_in\.weight is"):
        initialise_autoencoder(str(tmp_path), make_vae())


def test_invalid_initial_weights(make_vae, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither a trained model nor a training checkpoint"):
        initialise_autoencoder(str(tmp_path / "none"), make_vae())
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="files of 'model' are missing"):
        initialise_autoencoder(str(tmp_path), make_vae())
    (tmp_path / "model-0-of-1.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="Cannot read the checkpoint file"):
        initialise_autoencoder(str(tmp_path), make_vae())


def test_positions_interpolated_to_the_same_grid_are_the_same(make_vae) -> None:
    positions = make_vae(resolution=48).encoder.patch_positions.detach()
    assert torch.equal(interpolated_positions(positions, (6, 6), (6, 6)), positions)


def test_interpolated_positions_stay_where_they_were() -> None:
    """Embeddings that are coordinates, from 0 to 1 over the frame, are coordinates in the other grid too."""

    def coordinates(rows: int, columns: int) -> torch.Tensor:
        y, x = (torch.arange(n) / n + 0.5 / n for n in (rows, columns))
        return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)

    wide = interpolated_positions(coordinates(12, 12), (12, 12), (9, 16))
    inside = torch.zeros(9, 16, dtype=torch.bool)
    inside[2:-2, 3:-3] = True  # the border repeats its last values
    assert torch.allclose(wide[inside.flatten()], coordinates(9, 16)[inside.flatten()], atol=5e-3)


@pytest.mark.parametrize("kind", ["vae", "pipeline", "checkpoint"])
def test_a_model_of_squares_starts_one_of_rectangles(make_vae, make_pipeline, tmp_path: Path, kind: str) -> None:
    source = make_pipeline().vae if kind == "pipeline" else make_vae(seed=3)
    if kind == "vae":
        save_autoencoder(str(tmp_path), source)
    elif kind == "pipeline":
        make_pipeline().save_pretrained(str(tmp_path))
    else:
        save_checkpoint(tmp_path, engine(source), TrainState(1, 2, "x"))
        (tmp_path / MODEL).write_text(json.dumps(describe_autoencoder(source.config)))
    model = make_vae(seed=5, resolution=[16, 40])
    initialise_autoencoder(str(tmp_path), model)
    for half, theirs in ((model.encoder, source.encoder), (model.decoder, source.decoder)):
        assert torch.equal(half.patch_positions, interpolated_positions(theirs.patch_positions, (2, 2), (2, 5)))
    others = dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        assert "patch_positions" in name or torch.equal(parameter, others[name]), name


def test_a_turned_model_is_no_copy(make_vae, tmp_path: Path) -> None:
    """Frames of 16 x 40 and of 40 x 16 have equally many patches, in other places."""
    save_autoencoder(str(tmp_path), source := make_vae(seed=3, resolution=[16, 40]))
    model = make_vae(seed=5, resolution=[40, 16])
    initialise_autoencoder(str(tmp_path), model)
    assert not torch.equal(model.encoder.patch_positions, source.encoder.patch_positions)


def evaluated(model, shape: int) -> torch.Tensor:
    """The output for one clip of each class in frames of a shape."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(model.config.num_classes + 1)
    noisy = torch.randn(len(labels), 4, model.config.num_tokens, model.config.token_dim, generator=generator)
    return model(noisy, torch.full((len(labels), 4), 300), model.label(labels, shape))


def test_an_ar_dit_learns_further_shapes(make_pipeline, make_dit, tmp_path: Path) -> None:
    source = make_pipeline(num_classes=3)
    source.save_pretrained(str(tmp_path))
    shapes = [Resolution(16, 16), Resolution(16, 32), Resolution(32, 16)]
    model = make_dit(num_classes=3, num_shapes=3, seed=5)
    initialise_dit(str(tmp_path), model, shapes)
    for shape in range(3):
        assert torch.equal(evaluated(model, shape), evaluated(source.dit, 0))
    latents = LatentSet("x", 8, 2, 4, ["a", "b", "c"], [], [], source.statistics, "", shapes=[[*s] for s in shapes])
    task = train_dit.make_task(TrainDiTConfig(init_from=str(tmp_path), dit=model.config), latents)
    assert same(task.model, model)
    with pytest.raises(CheckpointError, match=r"shape_embedding\.weight is missing"):
        initialise_dit(str(tmp_path), model, shapes, new_layers=False)


def test_an_ar_dit_of_several_shapes_is_the_start_for_others(make_pipeline, make_dit, tmp_path: Path) -> None:
    source = make_pipeline(num_classes=3, num_shapes=2)
    source.vae.config = replace(source.vae.config, buckets=(Resolution(16, 32),))
    source.save_pretrained(str(tmp_path))
    square, wide = evaluated(source.dit, 0), evaluated(source.dit, 1)
    assert not torch.allclose(square, wide)
    model = make_dit(num_classes=3, num_shapes=2, seed=5)
    initialise_dit(str(tmp_path), model, [Resolution(8, 24), Resolution(8, 8)])  # 8 x 24 is nearer to 16 x 32
    assert torch.equal(evaluated(model, 0), wide)
    assert torch.equal(evaluated(model, 1), square)
    single = make_dit(num_classes=3, seed=5)
    initialise_dit(str(tmp_path), single)
    torch.testing.assert_close(evaluated(single, 0), square)
