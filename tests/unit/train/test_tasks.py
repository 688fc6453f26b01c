"""What a batch costs, for both tasks."""

from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ardiff.data.latents import LatentStatistics
from ardiff.data.transforms import to_uint8, to_unit
from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.noise import q_sample
from ardiff.diffusion.prediction import prediction_target
from ardiff.diffusion.timestep_sampling import sample_timesteps
from ardiff.dit import DiT, DiTConfig
from ardiff.errors import TrainingError
from ardiff.metrics.networks.lpips import LPIPS
from ardiff.randomness import BatchGenerator
from ardiff.train.tasks import AutoencoderTask, AutoencoderTaskConfig, DiTTask, DiTTaskConfig, Task
from ardiff.vae.config import DiscriminatorConfig

STATISTICS = LatentStatistics([[0.5, 0.0, -0.5, 1.0]] * 2, 2.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(seed: int = 0) -> BatchGenerator:
    return BatchGenerator("test", seed)


def clips() -> dict[str, torch.Tensor]:
    return {"video": torch.randint(0, 256, (2, 4, 16, 16, 3), dtype=torch.uint8, generator=generator())}


def latents(batch: int = 4) -> dict[str, torch.Tensor]:
    return {"latents": torch.randn(batch, 5, 2, 4, generator=generator()), "label": torch.arange(batch) % 3}


def dit_task(model: torch.nn.Module, diffusion: DiffusionConfig | None = None, **settings: Any) -> DiTTask:
    return DiTTask(model, DiTTaskConfig(**settings), diffusion or DiffusionConfig(), STATISTICS)  # type: ignore[arg-type]


class Perfect(torch.nn.Module):
    """Knows the clean latents, so that its x0 prediction has no error."""

    config = DiTConfig(num_classes=3)
    null_class = 3
    label = DiT.label

    def __init__(self, answer: torch.Tensor) -> None:
        super().__init__()
        self.answer = answer
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor, text: None = None
    ) -> torch.Tensor:
        self.calls.append((x, timesteps, labels))
        return self.answer


def test_autoencoder_loss_is_the_sum_of_its_terms(make_vae):
    model, video = make_vae(), to_unit(clips()["video"])
    noise = draws()(2, lambda g: torch.randn(4, 2, 4, generator=g))
    output, posterior = model(video, noise)
    for kind, distance in (("mse", (output - video).square().mean()), ("l1", (output - video).abs().mean())):
        task = AutoencoderTask(model, AutoencoderTaskConfig(reconstruction=kind, kl_weight=0.25))
        loss, parts = task.loss(clips(), 0, draws())
        assert float(parts["reconstruction"]) == pytest.approx(float(distance), rel=1e-5)
        assert float(parts["kl"]) == pytest.approx(float(posterior.kl()), rel=1e-5)
        assert float(loss) == pytest.approx(float(distance + 0.25 * posterior.kl()), rel=1e-5)


def test_straightness_is_the_second_difference_of_latent_means(make_vae):
    model, batch = make_vae(), clips()
    plain, straight = (
        AutoencoderTask(model, AutoencoderTaskConfig(straightness_weight=weight)).loss(batch, 0, draws())
        for weight in (0.0, 2.0)
    )
    means = model.encode(to_unit(batch["video"])).mean
    curvature = float((means[:, 2:] - 2 * means[:, 1:-1] + means[:, :-2]).square().mean())
    assert curvature > 0
    assert float(straight[1]["curvature"]) == pytest.approx(curvature, rel=1e-5)
    assert float(straight[0] - plain[0]) == pytest.approx(2 * curvature, rel=1e-4)
    for frames in (1, 2):  # too few for a second difference
        short = AutoencoderTask(model, AutoencoderTaskConfig(straightness_weight=2.0))
        assert "curvature" not in short.loss({**batch, "video": batch["video"][:, :frames]}, 0, draws())[1]


def test_the_terms_on_latents_warm_up(make_vae):
    model, batch = make_vae(), clips()

    def loss(step: int, **settings: Any) -> float:
        return float(AutoencoderTask(model, AutoencoderTaskConfig(**settings)).loss(batch, step, draws())[0])

    weights = {"kl_weight": 3.0, "straightness_weight": 20.0}
    bare, whole = loss(0, kl_weight=0.0), loss(0, **weights)
    assert whole > 1.1 * bare
    for step, share in ((0, 0.25), (1, 0.5), (3, 1.0), (9, 1.0)):
        for power in (2.0, 4.0):
            value = loss(step, kl_warmup_steps=3, kl_warmup_power=power, **weights)
            assert value == pytest.approx(bare + share**power * (whole - bare), rel=1e-5)


def test_autoencoder_reads_the_past_from_its_step_on(make_vae):
    model = make_vae()
    task = AutoencoderTask(model, AutoencoderTaskConfig(temporal_from_step=3))
    losses = [float(task.loss(clips(), step, draws())[0]) for step in range(5)]
    assert len({losses[0], losses[1], losses[2]}) == len({losses[3], losses[4]}) == 1
    assert losses[2] != losses[3]
    task.loss(clips(), 2, draws())[0].backward()
    assert model.decoder.temporal[0].query.weight.grad is None
    task.loss(clips(), 3, draws())[0].backward()
    assert model.decoder.temporal[0].query.weight.grad is not None


def adversarial_task(model: torch.nn.Module, **settings: Any) -> AutoencoderTask:
    sizes = DiscriminatorConfig(width=4, depth=1)
    task = AutoencoderTask(model, AutoencoderTaskConfig(adversarial_weight=0.5, discriminator=sizes, **settings))  # type: ignore[arg-type]
    assert task.discriminator is not None
    for parameter in task.discriminator.parameters():
        parameter.data.normal_(std=0.2, generator=generator(parameter.numel()))
    return task


def test_the_adversarial_loss_is_weighted_adaptively_from_its_step_on(make_vae):
    model = make_vae()
    task = adversarial_task(model, adversarial_from_step=3)
    plain, _ = AutoencoderTask(model, AutoencoderTaskConfig()).loss(clips(), 2, draws())
    before, parts = task.loss(clips(), 2, draws())
    assert float(before.detach()) == float(plain.detach())
    assert "adversarial" not in parts
    after, parts = task.loss(clips(), 3, draws())
    expected = float(plain) + 0.5 * float(parts["adaptive_weight"]) * float(parts["adversarial"])
    assert float(after) == pytest.approx(expected, rel=1e-5)
    weight, gradients = model.decoder.patch_out.weight, []
    for part in (parts["reconstruction"], parts["adversarial"]):
        gradients.append(torch.autograd.grad(part, weight, retain_graph=True)[0].norm())
    assert float(parts["adaptive_weight"]) == pytest.approx(float(gradients[0] / (gradients[1] + 1e-4)), rel=1e-4)


def test_the_perceptual_loss_counts_as_reconstruction(make_vae, tmp_path):
    lpips = LPIPS("alex")
    for parameter in lpips.parameters():
        parameter.data.normal_(std=0.05, generator=generator(parameter.numel()))
    save_file(lpips.state_dict(), tmp_path / "lpips.safetensors")
    batch = {"video": clips()["video"].repeat_interleave(2, 2).repeat_interleave(2, 3)}
    model = make_vae(resolution=32)
    plain, _ = AutoencoderTask(model, AutoencoderTaskConfig()).loss(batch, 0, draws())
    config = AutoencoderTaskConfig(perceptual_weight=2.0, perceptual_weights=str(tmp_path / "lpips.safetensors"))
    task = AutoencoderTask(model, config)
    loss, parts = task.loss(batch, 0, draws())
    assert float(parts["perceptual"]) > 0
    assert float(loss) == pytest.approx(float(plain) + 2 * float(parts["perceptual"]), rel=1e-5)


def test_neither_loss_reaches_the_other_network(make_vae):
    model = make_vae()
    task = adversarial_task(model)
    task.loss(clips(), 0, draws())[0].backward()
    assert all(p.grad is None for p in task.discriminator.parameters())  # type: ignore[union-attr]
    slopes = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    loss, parts = task.discriminator_loss()
    loss.backward()
    assert all(p.grad is not None for p in task.discriminator.parameters())  # type: ignore[union-attr]
    for parameter, slope in zip(model.parameters(), slopes, strict=True):
        assert (slope is None and parameter.grad is None) or torch.equal(parameter.grad, slope)
    assert set(parts) == {"discriminator_real", "discriminator_fake"}


def test_without_a_weight_there_is_no_discriminator(make_vae):
    task = AutoencoderTask(make_vae(), AutoencoderTaskConfig())
    assert task.discriminator is None
    with pytest.raises(NotImplementedError):
        Task.discriminator_loss(task)


def test_autoencoder_samples_stand_above_their_reconstruction(make_vae):
    model, examples = make_vae(), clips()["video"]
    sheet = AutoencoderTask(model, AutoencoderTaskConfig(), examples).samples(model)
    assert sheet is not None
    assert sheet.dtype == torch.uint8
    assert torch.equal(sheet[0::2], examples)
    assert torch.equal(sheet[1::2], to_uint8(model.decode(model.encode(to_unit(examples)).mean)))
    assert AutoencoderTask(model, AutoencoderTaskConfig()).samples(model) is None


def test_dit_sees_normalised_latents_corrupted_to_its_timesteps() -> None:
    batch = latents()
    x0 = (batch["latents"] - torch.tensor(STATISTICS.mean)) / 2.0
    model = Perfect(x0)
    loss, parts = dit_task(model, class_dropout=0.0).loss(batch, 0, draws())
    assert float(loss) == 0.0
    ((x_t, timesteps, labels),) = model.calls
    assert labels.tolist() == batch["label"].tolist()
    assert (timesteps.diff(dim=1) >= 0).all()
    assert float(parts["mean_timestep"]) == pytest.approx(float(timesteps.float().mean()))
    abar = DiffusionConfig().alphas_cumprod()[timesteps][..., None, None]
    eps = (x_t - abar.sqrt() * x0) / (1 - abar).sqrt()
    assert abs(float(eps.mean())) < 0.3
    assert abs(float(eps.std()) - 1) < 0.2


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_dit_is_trained_on_the_configured_target(prediction: str) -> None:
    batch, diffusion = latents(), DiffusionConfig(prediction=prediction)  # type: ignore[arg-type]
    x0 = STATISTICS.normalise(batch["latents"])
    spy = Perfect(x0)
    dit_task(spy, diffusion).loss(batch, 0, draws())
    x_t, timesteps, _ = spy.calls[0]
    abar = diffusion.alphas_cumprod()[timesteps][..., None, None]
    eps = (x_t - abar.sqrt() * x0) / (1 - abar).sqrt()
    target = eps if prediction == "eps" else abar.sqrt() * eps - (1 - abar).sqrt() * x0
    assert float(dit_task(Perfect(target.float()), diffusion).loss(batch, 0, draws())[0]) < 1e-6
    assert float(dit_task(Perfect(target.float() + 1), diffusion).loss(batch, 0, draws())[0]) == pytest.approx(1)


@pytest.mark.parametrize("law", ["fopp", "synchronous", "independent", "uniform_from_first"])
def test_dit_draws_timesteps_as_configured(law: str) -> None:
    batch = latents(64)
    model = Perfect(batch["latents"])
    dit_task(model, DiffusionConfig(timestep_sampling=law)).loss(batch, 0, draws())  # type: ignore[arg-type]
    differences = model.calls[0][1].diff(dim=1)
    assert bool((differences < 0).any()) == (law == "independent")
    assert bool((differences == 0).all()) == (law == "synchronous")


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_class_dropout_puts_the_null_class(share: float) -> None:
    batch = latents(600)
    model = Perfect(batch["latents"])
    dit_task(model, class_dropout=share).loss(batch, 0, draws())
    labels = model.calls[0][2]
    dropped = labels == model.null_class
    assert abs(float(dropped.float().mean()) - share) < (0.06 if 0 < share < 1 else 1e-9)
    assert torch.equal(labels[~dropped], batch["label"][~dropped])


def text_batch(batch: int = 600) -> dict[str, torch.Tensor]:
    """Every third clip has no text."""
    mask = (torch.arange(4) <= torch.arange(batch)[:, None] % 3) & (torch.arange(batch)[:, None] % 3 > 0)
    return {**latents(batch), "text": torch.randn(batch, 4, 5, generator=generator()), "text_mask": mask}


class PerfectWithText(Perfect):
    config = DiTConfig(num_classes=3, condition="cross_attention", condition_dim=5)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor, text: Any) -> torch.Tensor:  # type: ignore[override]
        self.text = text
        return super().forward(x, timesteps, labels)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_text_is_dropped_apart_from_classes(share: float) -> None:
    batch = text_batch()
    model = PerfectWithText(batch["latents"])
    dit_task(model, class_dropout=0.5, text_dropout=share).loss(batch, 0, draws())
    labels, index = model.calls[0][2], model.text.index
    assert torch.equal(model.text.states, batch["text"])
    has_text = batch["text_mask"].any(dim=1)
    assert (index[~has_text] == -1).all()
    dropped = index[has_text] == -1
    assert torch.equal(index[index >= 0], torch.arange(600)[index >= 0])
    assert abs(float(dropped.float().mean()) - share) < (0.06 if 0 < share < 1 else 1e-9)
    if share == 0.3:
        with_class = labels[has_text] != model.null_class
        assert abs(float(dropped[with_class].float().mean()) - 0.3) < 0.1
        assert abs(float(dropped[~with_class].float().mean()) - 0.3) < 0.1


def test_text_changes_no_other_draw_and_reaches_the_loss(make_dit) -> None:
    """A model whose text layers add nothing has the loss of a model without text, bit for bit."""
    batch, plain = text_batch(4), make_dit(num_frames=5)
    model = make_dit(num_frames=5, condition="cross_attention", condition_dim=5)
    reads = float(dit_task(model).loss(batch, 0, draws())[0])
    model.load_state_dict(plain.state_dict(), strict=False)
    for block in model.blocks:
        block.text_attention.proj.weight.data.zero_()
        block.text_attention.proj.bias.data.zero_()
    expected = float(dit_task(plain).loss(batch, 0, draws())[0])
    assert float(dit_task(model).loss(batch, 0, draws())[0]) == expected
    assert reads != expected
    with pytest.raises(TrainingError, match="the training data has none"):
        dit_task(model).loss(latents(), 0, draws())


def test_clips_are_encoded_in_the_step(make_dit, make_vae):
    model, vae, video = make_dit(), make_vae(), torch.cat([clips()["video"]] * 2)

    def encode(video: torch.Tensor) -> torch.Tensor:
        return vae.encode(to_unit(video)).mean

    labels = torch.arange(4) % 3
    stored = DiTTask(model, DiTTaskConfig(), DiffusionConfig(), STATISTICS)
    fed = DiTTask(model, DiTTaskConfig(), DiffusionConfig(), STATISTICS, encode=encode)
    with torch.no_grad():
        latents = encode(video)
        expected, _ = stored.loss({"latents": latents, "label": labels}, 0, draws())
        found, _ = fed.loss({"video": video, "label": labels}, 0, draws())
    assert torch.equal(found, expected)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_teacher_forcing_shows_the_clean_frames_before(make_dit, share: float) -> None:
    """The loss is that of clips evaluated one by one, with the noise and timesteps of the same draws."""
    model, batch, diffusion = make_dit().double(), latents(8), DiffusionConfig()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2, generator=generator(parameter.numel()))
    task = dit_task(model, class_dropout=0.0, teacher_forcing=share)
    batch["latents"] = batch["latents"].double()
    loss, logged = task.loss(batch, 0, draws())

    x0, again = STATISTICS.normalise(batch["latents"]), draws()
    generators = again.generators(8)
    timesteps = sample_timesteps("fopp", 8, 5, 1000, generators)
    eps = again(8, lambda g: torch.randn((5, 2, 4), generator=g))
    again(8, lambda g: torch.rand((), generator=g))  # of the dropout of classes
    independent = sample_timesteps("independent", 8, 5, 1000, generators)
    errors = []
    for clip in range(8):
        forced = int((clip + 1) * share) > int(clip * share)
        t = (independent if forced else timesteps)[clip : clip + 1]
        x_t = q_sample(x0[clip : clip + 1], eps[clip : clip + 1], t, diffusion.alphas_cumprod())
        schedule, label = diffusion.alphas_cumprod(), batch["label"][clip : clip + 1]
        noise = eps[clip : clip + 1]
        target = prediction_target(diffusion.prediction, x0[clip : clip + 1], noise, x_t, t, schedule)
        if not forced:
            output = model(x_t, t, label)
        else:  # each frame alone, after the clean frames before it
            clean = torch.cat([x0[clip : clip + 1], x_t], dim=1)
            rows = [torch.cat([clean[:, :f], x_t[:, f : f + 1]], dim=1) for f in range(5)]
            levels = [torch.cat([torch.ones(1, f, dtype=torch.int64), t[:, f : f + 1]], dim=1) for f in range(5)]
            output = torch.cat([model(r, n, label)[:, -1:] for r, n in zip(rows, levels, strict=True)], dim=1)
        errors.append((output - target).square().mean())
    assert float(loss) == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)
    assert sum(float(logged[f"loss_frame_{f:02d}"][1]) for f in range(5)) == 40


def test_teacher_forcing_is_spread_over_the_batch_whatever_its_parts(make_dit) -> None:
    for share, expected in ((0.0, 0), (0.3, 3), (0.5, 5), (1.0, 10)):
        task = dit_task(make_dit(), teacher_forcing=share)
        whole = task._forced(10, draws())
        assert int(whole.sum()) == expected
        parts = [task._forced(2, BatchGenerator("test", 0, first=first)) for first in range(0, 10, 2)]
        assert torch.equal(torch.cat(parts), whole)
        assert all(int(part.sum()) <= 1 for part in parts) or share > 0.5


@pytest.mark.parametrize("frames", [1, 3])
def test_openings_are_short_clips(make_dit, frames: int) -> None:
    """Their loss is added to that of the clips, whose draws stay as they are."""
    model, batch, diffusion = make_dit().double(), latents(3), DiffusionConfig(prediction="v")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2, generator=generator(parameter.numel()))
    batch["latents"] = batch["latents"].double()
    settings = {"class_dropout": 0.5, "teacher_forcing": 0.5}
    of_clips, _ = DiTTask(model, DiTTaskConfig(**settings), diffusion, STATISTICS).loss(batch, 0, used := draws())
    recipe = DiTTaskConfig(**settings, openings=2, opening_frames=frames)
    loss, logged = DiTTask(model, recipe, diffusion, STATISTICS).loss(batch, 0, draws())

    x0 = STATISTICS.normalise(batch["latents"])[:, :frames]  # (3, O, 2, 4)
    eps = used(3, lambda g: torch.randn((2, frames, 2, 4), generator=g))
    timesteps = [sample_timesteps("fopp", 3, frames, 1000, used.generators(3)) for _ in range(2)]
    again = draws()
    sample_timesteps("fopp", 3, 5, 1000, again.generators(3))
    again(3, lambda g: torch.randn((5, 2, 4), generator=g))
    labels = dit_task(model, **settings)._labels(batch, again)
    errors, schedule = [], diffusion.alphas_cumprod()
    for clip in range(3):
        for number in range(2):
            noise, t, clean = eps[clip : clip + 1, number], timesteps[number][clip : clip + 1], x0[clip : clip + 1]
            x_t = q_sample(clean, noise, t, schedule)
            target = prediction_target("v", clean, noise, x_t, t, schedule)
            errors.append((model(x_t, t, labels[clip : clip + 1]) - target).square().mean())
    assert float(logged["loss_openings"]) == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)
    assert float(loss) == pytest.approx(float(of_clips + logged["loss_openings"]), rel=1e-6)


def test_a_model_without_classes_sees_no_label(make_dit):
    model = make_dit(num_classes=0, num_frames=5)
    batch = latents()  # of data with three classes
    losses = [
        float(dit_task(model, class_dropout=0.0).loss({**batch, "label": labels}, 0, draws())[0])
        for labels in (batch["label"], torch.zeros(4, dtype=torch.int64))
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("clip", [0.0, 0.5, 2.0])
def test_noise_is_clipped(clip: float) -> None:
    batch, diffusion = latents(64), DiffusionConfig()
    x0, seen = STATISTICS.normalise(batch["latents"]), []
    for limit in (0.0, clip):
        spy = Perfect(x0)
        dit_task(spy, diffusion, noise_clip=limit).loss(batch, 0, draws())
        x_t, timesteps, _ = spy.calls[0]
        abar = diffusion.alphas_cumprod()[timesteps][..., None, None]
        seen.append((x_t - abar.sqrt() * x0) / (1 - abar).sqrt())
    expected = seen[0].clamp(-clip, clip) if clip else seen[0]
    assert torch.allclose(seen[1], expected, atol=1e-3)
    assert float(seen[0].abs().max()) > 2.5


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_dit_trains_and_samples_with_either_attention(make_dit, attention: str) -> None:
    model = make_dit(num_frames=5, attention=attention)
    task = DiTTask(model, DiTTaskConfig(), DiffusionConfig(), STATISTICS, lambda z: z.new_zeros(*z.shape[:2], 3, 4, 4))
    task.loss(latents(), 0, draws())[0].backward()
    assert all(p.grad is not None for p in model.parameters())
    videos = task.samples(model)
    assert videos is not None
    assert videos.shape == (3, 5, 4, 4, 3)


def test_dit_samples_one_video_per_class(make_dit):
    model = make_dit(num_frames=3)
    task = DiTTask(model, DiTTaskConfig(), DiffusionConfig(), STATISTICS, lambda z: z.new_zeros(*z.shape[:2], 3, 4, 4))
    for classes, count in ((3, 3), (0, 1), (20, 8)):
        model = make_dit(num_frames=3, num_classes=classes)
        videos = task.samples(model)
        assert videos is not None
        assert videos.shape == (count, 3, 4, 4, 3)
        assert videos.dtype == torch.uint8
    assert dit_task(model).samples(model) is None


def test_dit_samples_are_fixed_and_denormalised(make_dit):
    model, seen = make_dit(num_frames=3), []

    def decode(z: torch.Tensor) -> torch.Tensor:
        seen.append(z)
        return z.new_zeros(*z.shape[:2], 3, 4, 4)

    task = DiTTask(model, DiTTaskConfig(), DiffusionConfig(), STATISTICS, decode)
    plain = DiTTask(model, DiTTaskConfig(), DiffusionConfig(), LatentStatistics([[0.0] * 4] * 2, 1.0), decode)
    for each in (task, task, plain):
        each.samples(model)
    assert torch.equal(seen[0], seen[1])
    assert torch.allclose(seen[0], STATISTICS.denormalise(seen[2]))


def test_the_generator_is_the_only_source_of_randomness(make_dit, make_vae):
    tasks: list[tuple[Task, dict[str, torch.Tensor]]] = [
        (AutoencoderTask(make_vae(), AutoencoderTaskConfig()), clips()),
        (dit_task(make_dit(), class_dropout=0.5), latents()),
    ]
    for task, batch in tasks:
        state = torch.get_rng_state()
        first, second, other = (float(task.loss(batch, 0, draws(seed))[0]) for seed in (1, 1, 2))
        assert first == second != other
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (AutoencoderTaskConfig, {"kl_weight": -1.0}),
        (AutoencoderTaskConfig, {"straightness_weight": -1.0}),
        (AutoencoderTaskConfig, {"kl_warmup_steps": -1}),
        (AutoencoderTaskConfig, {"kl_warmup_power": 0.0}),
        (AutoencoderTaskConfig, {"temporal_from_step": -1}),
        (AutoencoderTaskConfig, {"adversarial_weight": -1.0}),
        (AutoencoderTaskConfig, {"perceptual_weight": -1.0}),
        (AutoencoderTaskConfig, {"perceptual_weight": 1.0}),
        (AutoencoderTaskConfig, {"adversarial_from_step": -1}),
        (DiTTaskConfig, {"class_dropout": 1.5}),
        (DiTTaskConfig, {"class_dropout": -0.1}),
        (DiTTaskConfig, {"noise_clip": -1.0}),
        (DiTTaskConfig, {"openings": -1}),
        (DiTTaskConfig, {"opening_frames": 0}),
    ],
)
def test_impossible_settings(make, settings):
    with pytest.raises(ValueError, match=r"must|needs"):
        make(**settings)


def test_unknown_reconstruction_loss(make_vae):
    task = AutoencoderTask(make_vae(), AutoencoderTaskConfig(reconstruction="ssim"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown reconstruction loss 'ssim'"):
        task.loss(clips(), 0, draws())


def test_draws_of_a_sample_depend_on_its_index_only() -> None:
    def draw(generator: torch.Generator) -> torch.Tensor:
        return torch.randn(3, generator=generator)

    one = draws()
    whole, second = one(6, draw), one(6, draw)
    for share in (1, 2, 3):
        cut = [BatchGenerator("test", 0, first=first) for first in range(0, 6, share)]
        assert torch.equal(torch.cat([each(share, draw) for each in cut]), whole)
        assert torch.equal(torch.cat([each(share, draw) for each in cut]), second)
    rows = torch.cat([whole, second, draws(1)(6, draw)])
    assert len(torch.unique(rows, dim=0)) == len(rows)
    # The format of training noise: another value here is another training run.
    assert whole[0].tolist() == pytest.approx([-1.1949762, 0.0523184, 1.0212102], abs=1e-6)


@pytest.mark.parametrize("kind", ["dit", "forced", "vae"])
def test_the_loss_of_a_batch_is_the_mean_over_its_micro_batches(make_dit, make_vae, kind: str) -> None:
    batch = {"video": clips()["video"].repeat(3, 1, 1, 1, 1)} if kind == "vae" else latents(6)
    task: Task = AutoencoderTask(make_vae(), AutoencoderTaskConfig())
    if kind != "vae":
        forced = {"teacher_forcing": 0.5, "openings": 2, "opening_frames": 2} if kind == "forced" else {}
        task = dit_task(make_dit(), class_dropout=0.5, **forced)
    whole, _ = task.loss(batch, 0, draws())
    parts = [
        task.loss({k: v[first : first + 2] for k, v in batch.items()}, 0, BatchGenerator("test", 0, first=first))[0]
        for first in (0, 2, 4)
    ]
    assert float(sum(parts)) / 3 == pytest.approx(float(whole), rel=1e-5)
