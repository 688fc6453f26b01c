"""`ardiff distill`: from a pipeline and stored latents to a student, which `ardiff generate` samples."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from jobs import Jobs, Result
from resuming import kill_and_compare

from ardiff.data.latents import LatentStatistics
from ardiff.diffusion.config import DiffusionConfig
from ardiff.diffusion.student import Student
from ardiff.dit import DiT, DiTConfig
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.pretrained import load_autoencoder

pytestmark = pytest.mark.ray

Command = Callable[..., Result]
SIZES: dict[str, Any] = {"num_frames": 8, "num_tokens": 2, "token_dim": 4, "width": 32, "depth": 2, "num_heads": 2}
TRAIN = ["train.batch_size=8", "train.log_every=2", "train.cpu_threads=1", "train.loading_tasks=1", "files_per_chunk=2"]


def make_teacher(latents: Path, folder: Path, **changes: Any) -> Path:
    """A pipeline with random weights and the AR-VAE of the latents."""
    torch.manual_seed(1)
    diffusion = changes.pop("diffusion", DiffusionConfig(prediction="v"))
    statistics = changes.pop("statistics", LatentStatistics([[0.0] * 4] * 2, 1.0))
    names = changes.pop("names", ["a", "b", "c"])
    dit = DiT(DiTConfig(**{**SIZES, "num_classes": len(names), **changes}))
    for parameter in dit.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    pipeline = ARDiffusionPipeline(load_autoencoder(str(latents / "vae")), dit, diffusion, statistics, names)
    pipeline.save_pretrained(str(folder))
    return folder


def test_a_student_generates_as_it_was_made_for(ardiff: Command, cluster: None, latents: Path, tmp_path: Path) -> None:
    """Also from a checkpoint; and it refuses what it cannot do."""
    teacher = make_teacher(latents, tmp_path / "teacher")
    settings = [f"teacher={teacher}", f"latents={latents}", *TRAIN, "train.num_steps=4", "train.checkpoint_every=4"]
    settings += ["task.trajectory_uses=2"]
    settings += ["task.student_steps=2", "task.guidance=1.5", "train.sample_every=4"]
    ardiff("distill", "--output", tmp_path / "run", *settings).expect(0)
    run = tmp_path / "run"
    student = ARDiffusionPipeline.from_pretrained(str(run / "pipeline"))
    expected = Student(timesteps=(999, 842, 614, 303), num_steps=2, guidance=1.5)
    assert student.info.student == expected
    assert json.loads((run / "pipeline" / "config.json").read_text())["diffusion"]["student"]["num_steps"] == 2
    assert student.class_names == ["a", "b", "c"]
    before = dict(ARDiffusionPipeline.from_pretrained(str(teacher)).dit.named_parameters())
    assert any(not torch.equal(p, before[name]) for name, p in student.dit.named_parameters())
    assert list((run / "samples").glob("*.png"))
    losses = json.loads((run / "history.json").read_text())
    assert {"loss_frame_00", "loss_t_750_999"} <= losses.keys()

    [checkpoint] = (run / "ray").glob("checkpoint-*")
    ardiff("export", checkpoint, tmp_path / "exported").expect(0)
    exported = ARDiffusionPipeline.from_pretrained(str(tmp_path / "exported"))
    assert exported.info == student.info
    assert all(torch.equal(a, b) for a, b in zip(exported.dit.parameters(), student.dit.parameters(), strict=True))

    generate = [f"pipeline={run / 'pipeline'}", "num_videos=2", "num_frames=10", "max_actors=1", "cpu_threads=1"]
    ardiff("generate", f"output={tmp_path / 'videos'}", *generate).expect(0)
    assert pq.read_metadata(tmp_path / "videos" / "manifest.parquet").num_rows == 2
    refused = ardiff("generate", f"output={tmp_path / 'others'}", *generate, "num_inference_steps=20")
    assert refused.code == 2
    assert "a student of 1 to 4 steps: leave num_inference_steps out" in refused.complaint


def test_pipelines_that_cannot_teach(ardiff: Command, latents: Path, tmp_path: Path) -> None:
    """Each says why, before Ray starts."""
    student = DiffusionConfig(prediction="v", student=Student(timesteps=(999,)))
    other = LatentStatistics([[0.5] * 4] * 2, 2.0)
    teachers: dict[str, dict[str, Any]] = {
        "its frames see later ones": {"attention": "bidirectional"},
        "it predicts noise": {"diffusion": DiffusionConfig(prediction="eps")},
        "it is a student itself": {"diffusion": student},
        "has x, y, z": {"names": ["x", "y", "z"]},
        "dit.num_frames is 4, but": {"num_frames": 4},
        "no condition tokens of its own": {"condition": "tokens", "positions": "sincos"},
    }
    for reason, changes in teachers.items():
        teacher = make_teacher(latents, tmp_path / "teacher", **changes)
        result = ardiff("distill", f"teacher={teacher}", f"latents={latents}", f"output={tmp_path / 'run'}")
        assert result.code == 2
        assert reason in result.complaint
    missing = ardiff("distill", f"teacher={tmp_path / 'none'}", f"latents={latents}")
    assert missing.code == 1
    assert "There is no pipeline in" in missing.complaint

    pipeline = ARDiffusionPipeline.from_pretrained(str(make_teacher(latents, tmp_path / "teacher", statistics=other)))
    next(pipeline.vae.parameters()).data.add_(1.0)
    pipeline.save_pretrained(str(tmp_path / "teacher"))
    stranger = ardiff("distill", f"teacher={tmp_path / 'teacher'}", f"latents={latents}")
    assert stranger.code == 2
    assert "is not that of the teacher" in stranger.complaint
    assert not (tmp_path / "run").exists()


def test_checkpoints_lie_between_trajectories(ardiff: Command) -> None:
    result = ardiff("distill", "task.trajectory_uses=3", "train.num_steps=30", "train.checkpoint_every=10")
    assert result.code == 2
    assert "train.checkpoint_every must be a multiple of task.trajectory_uses (3)" in result.complaint


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [["train.engine=fsdp", "train.optimizer.name=muon"], ["train.engine=deepspeed", "train.deepspeed.stage=3"]],
)
def test_distillation_survives_sigkill(
    jobs: Jobs, ardiff: Command, cluster: None, latents: Path, tmp_path: Path, engine: list[str]
) -> None:
    teacher = make_teacher(latents, tmp_path / "teacher")
    settings = [f"teacher={teacher}", f"latents={latents}", *TRAIN, *engine, "task.trajectory_uses=5"]
    settings += ["train.num_steps=120", "train.checkpoint_every=10", "train.log_every=10"]
    kill_and_compare(jobs, ardiff, tmp_path, "distill", settings, "pipeline/dit.safetensors")
