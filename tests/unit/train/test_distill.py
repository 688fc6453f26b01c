"""What a student learns: the ends of its teacher's trajectories."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ardiff.data.latents import LatentStatistics
from ardiff.diffusion.ad import ad_schedule
from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.guidance import guided_denoiser
from ardiff.diffusion.sampler import sample_full
from ardiff.dit import DiT, TextTokens
from ardiff.randomness import BatchGenerator
from ardiff.train.tasks import Batch, DistillTask, DistillTaskConfig
from ardiff.train.tasks.distill import diffusion_of_student

STATISTICS = LatentStatistics([[0.5, 0.0, -0.5, 1.0]] * 2, 2.0)
DIFFUSION = DiffusionConfig(prediction="v")
MODELS: list[dict[str, Any]] = [
    {},
    {"attention_window": 3},
    {"condition": "tokens", "positions": "sincos", "condition_tokens": 3, "condition_dim": 5},
    {"kind": "upstream", "condition_attention": "self", "condition_tokens": 3, "condition_dim": 5},
    {"condition": "cross_attention", "condition_dim": 5},
]


def draws(seed: int = 0, first: int = 0) -> BatchGenerator:
    return BatchGenerator("test", seed, first=first)


def make_batch(text: bool = False, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    batch = {"latents": torch.randn(4, 5, 2, 4, generator=generator).double(), "label": torch.arange(4) % 3}
    if text:
        mask = torch.ones(4, 3, dtype=torch.bool)
        batch |= {"text": torch.randn(4, 3, 5, generator=generator).double(), "text_mask": mask}
    return batch


def make_task(make_dit: Callable[..., DiT], variant: dict[str, Any] | None = None, **settings: Any) -> DistillTask:
    student, teacher = (make_dit(seed, **(variant or {})).double() for seed in (0, 1))
    config = DistillTaskConfig(**{"class_dropout": 0.0, "text_dropout": 0.0, **settings})
    diffusion = diffusion_of_student(config, DIFFUSION)
    return DistillTask(student, teacher, config, diffusion, STATISTICS)


@pytest.mark.parametrize("variant", MODELS)
def test_ends_are_what_the_teacher_samples_after_the_clean_frames(
    make_dit: Callable[..., DiT], variant: dict[str, Any]
) -> None:
    task = make_task(make_dit, variant, start_probabilities=(1.0,), guidance=2.0)
    batch = make_batch(task.model.config.text)
    clips, *_ = task.trajectories(batch, draws())
    text = TextTokens.of_videos(batch["text"], batch["text_mask"], torch.zeros(4).bool()) if "text" in batch else None
    denoise = guided_denoiser(task.teacher, DIFFUSION, batch["label"], 2.0, text)
    clean = STATISTICS.normalise(batch["latents"])
    assert torch.equal(clips.context, clean)
    assert set(clips.timesteps.flatten().tolist()) == {999}
    for frame in range(5):
        start = torch.cat([clean[:, :frame], clips.noisy[:, frame : frame + 1]], dim=1)
        given = clean[:, :frame] if frame else None
        schedule = ad_schedule(frame + 1, 6, 6, num_given=frame)
        sampled = sample_full(denoise, start, schedule, DIFFUSION, given, "dpmpp_2m", "log_snr")
        assert torch.allclose(sampled[:, frame], clips.ends[:, frame], rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", MODELS)
def test_further_first_frames_see_no_other_frame(make_dit: Callable[..., DiT], variant: dict[str, Any]) -> None:
    """Each has noise of its own, and the class and text of its clip; without them there are only clips."""
    task = make_task(make_dit, variant, start_probabilities=(1.0,), guidance=2.0, first_frames=3)
    batch = make_batch(task.model.config.text)
    _, first = task.trajectories(batch, draws())
    assert (first.context, first.noisy.shape) == (None, (12, 1, 2, 4))
    assert len(first.noisy.flatten(1).unique(dim=0)) == 12
    assert first.labels.tolist() == batch["label"].repeat_interleave(3).tolist()
    text = None
    if "text" in batch:
        text = TextTokens(batch["text"], batch["text_mask"], torch.arange(4).repeat_interleave(3))
    denoise = guided_denoiser(task.teacher, DIFFUSION, first.labels, 2.0, text)
    sampled = sample_full(denoise, first.noisy, ad_schedule(1, 6, 6), DIFFUSION, None, "dpmpp_2m", "log_snr")
    assert torch.allclose(sampled, first.ends, rtol=0, atol=1e-10)
    assert len(make_task(make_dit, variant, first_frames=0).trajectories(batch, draws())) == 1


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_a_trajectory_may_begin_at_any_of_the_timesteps(make_dit: Callable[..., DiT], solver: Any) -> None:
    """With the last start, one step of first order is left, which leads to timestep 0."""
    task = make_task(make_dit, start_probabilities=(0.5, 0.0, 0.5), teacher_steps=3, teacher_solver=solver)
    clips, *_ = task.trajectories(make_batch(), draws())
    begun = clips.timesteps[:, 0] == task.table.timesteps[2]
    assert 0 < int(begun.sum()) < 4
    assert set(clips.timesteps[:, 0].tolist()) == {999, int(task.table.timesteps[2])}
    noisy, clean, labels = clips.noisy[begun], clips.context[begun], clips.labels[begun]
    denoise = guided_denoiser(task.teacher, DIFFUSION, labels, task.config.guidance, context=clean)
    x0 = denoise(noisy, clips.timesteps[begun], torch.arange(5))
    abar = DIFFUSION.alphas_cumprod()
    now, last = abar[task.table.timesteps[2]], abar[0]
    ratio = ((1 - last) / (1 - now)).sqrt()
    expected = ratio * noisy + (last.sqrt() - ratio * now.sqrt()) * x0
    assert torch.allclose(clips.ends[begun], expected, rtol=0, atol=1e-10)


def test_the_loss_compares_the_student_with_the_ends_and_reaches_only_the_student(
    make_dit: Callable[..., DiT],
) -> None:
    task = make_task(make_dit)
    loss, logged = task.loss(make_batch(), 0, draws())
    clips, first = task.trajectories(make_batch(), draws())
    denoise = guided_denoiser(task.model, DIFFUSION, clips.labels, 1.0, context=clips.context)
    x0 = denoise(clips.noisy, clips.timesteps, torch.arange(5))
    alone = guided_denoiser(task.model, DIFFUSION, first.labels, 1.0)(first.noisy, first.timesteps, torch.arange(1))
    expected = (x0 - clips.ends).square().mean() + (alone - first.ends).square().mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert {"loss_frame_00", "loss_frame_04", "loss_first_frames"} <= set(logged)
    loss.backward()
    assert all(p.grad is not None for p in task.model.parameters())
    assert all(p.grad is None for p in task.teacher.parameters())


def test_trajectories_are_used_several_times_and_then_replaced(make_dit: Callable[..., DiT]) -> None:
    task = make_task(make_dit, trajectory_uses=3)
    losses = [float(task.loss(make_batch(seed=step), step, draws(step))[0]) for step in range(4)]
    assert [task.kind_of(step) for step in range(4)] == [1, 0, 0, 1]  # those with the teacher's evaluations
    assert losses[0] == losses[1] == losses[2] != losses[3]
    assert losses[3] == float(make_task(make_dit).loss(make_batch(seed=3), 0, draws(3))[0])


def test_a_batch_split_over_workers_has_the_same_trajectories(make_dit: Callable[..., DiT]) -> None:
    task, batch = make_task(make_dit, class_dropout=0.5), make_batch()
    whole = task.trajectories(batch, draws())
    for first in (0, 2):
        part = {name: tensor[first : first + 2] for name, tensor in batch.items()}
        for ours, all_of_them in zip(task.trajectories(part, draws(first=first)), whole, strict=True):
            rows = len(all_of_them.noisy) // 4  # per sample
            own = slice(rows * first, rows * (first + 2))
            assert torch.equal(ours.noisy, all_of_them.noisy[own])
            assert torch.equal(ours.labels, all_of_them.labels[own])
            assert torch.allclose(ours.ends, all_of_them.ends[own], rtol=0, atol=1e-12)
        task.loss(part, 0, draws(first=first))
    assert len(task._trajectories) == 2  # of two micro-batches


def test_samples_are_made_as_the_student_is_sampled(make_dit: Callable[..., DiT]) -> None:
    task = make_task(make_dit, student_steps=2)
    assert task.samples(task.model) is None
    task.decode = lambda z: z[..., :3].unsqueeze(-2).movedim(-1, 2).float()  # (B, F, 3, L, 1)
    videos = task.samples(task.model)
    assert videos is not None
    assert videos.shape[:2] == (3, 8)


def test_what_the_student_is_made_for_follows_from_the_starts() -> None:
    config = DistillTaskConfig(start_probabilities=(0.5, 0.0, 0.5), student_steps=2, guidance=2.0)
    student = diffusion_of_student(config, DIFFUSION).student
    assert (student.timesteps, student.num_steps, student.guidance) == ((999, 614), 2, 2.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start_probabilities": (0.5, 0.6)}, "with sum 1"),
        ({"start_probabilities": (0.5, 0.5), "teacher_steps": 1}, r"1 to 1 numbers"),
        ({"start_probabilities": (0.0, 1.0)}, "sampling begins with pure noise"),
        ({"student_steps": 2, "start_probabilities": (1.0,)}, "trajectories begin at 1 timesteps only"),
        ({"trajectory_uses": 0}, "must be at least 1"),
        ({"first_frames": -1}, "first_frames must be 0 or more"),
        ({"guidance": -1.0}, "guidance must be a finite number"),
        ({"teacher_spacing": "distilled"}, "is for students"),
    ],
)
def test_settings_that_make_no_student(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillTaskConfig(**settings)
