"""What students of the quickstart's model make, against their teacher with more steps, in one process without Ray.

    python benchmarks/distill.py --keep runs/distill     # the tables of docs/sampling.md; trains the teacher once
    python benchmarks/distill.py --keep runs/distill --student task.student_steps=2 train.num_steps=560

The teacher is that of benchmarks/quality.py in the folder ``--keep``, trained there if there is none, about ten
minutes on a core. The student is stored beside it. Settings of the student are those of
configs/quickstart/distill.yaml, changed by ``--student``. Each row has 128 videos for each of three sampling seeds, and
95 % intervals (Student's t over the seeds). The distance is that of the quick evaluation, to 128 real clips.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality import (
    FRAMES,
    SHOWN,
    STEP,
    Videos,
    autoencoder,
    encode,
    files,
    generate,
    header,
    latent_batches,
    measures,
    row,
    run,
    trained_pipeline,
)
from torch import Tensor

from ardiff.config import COMMAND, build, load_config, read_settings
from ardiff.data.encode import contact_sheet
from ardiff.data.synthetic import CLASSES
from ardiff.metrics.distances import Frechet
from ardiff.metrics.networks.random3d import RandomVideoFeatures, scale_features
from ardiff.metrics.seeds import estimate_mean
from ardiff.models import make_dit
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.resolution import Resolution
from ardiff.sampling.cost import frame_evaluations
from ardiff.sampling.params import SamplingParams, validate
from ardiff.train.tasks import DistillTask
from ardiff.train.tasks.distill import diffusion_of_student, evaluations_of_update
from ray_jobs.training.config import DistillConfig, TrainDiTConfig

GUIDANCE = 1.5
TEACHER: dict[str, dict[str, Any]] = {
    "ddim, S = 50, ar_step 13": {"num_inference_steps": 50, "ar_step": 13},
    "ddim, S = 20, ar_step 5": {"num_inference_steps": 20, "ar_step": 5},
    "dpmpp_2m, S = 6, ar_step 6": {"num_inference_steps": 6, "ar_step": 6, "solver": "dpmpp_2m"},
    "dpmpp_2m, S = 4, ar_step 4": {"num_inference_steps": 4, "ar_step": 4, "solver": "dpmpp_2m"},
    "dpmpp_2m, S = 4, ar_step 2": {"num_inference_steps": 4, "ar_step": 2, "solver": "dpmpp_2m"},
    "dpmpp_2m, S = 4, ar_step 1": {"num_inference_steps": 4, "ar_step": 1, "solver": "dpmpp_2m"},
    "unipc, S = 4, ar_step 4": {"num_inference_steps": 4, "ar_step": 4, "solver": "unipc"},
    "ddim, S = 4, ar_step 4": {"num_inference_steps": 4, "ar_step": 4, "solver": "ddim"},
}
SEEDS = range(3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, required=True, help="folder of teacher and student")
    parser.add_argument("--seed", type=int, default=0, help="seed of all trainings")
    parser.add_argument("--student", nargs="*", default=[], help="key=value settings of the distillation")
    parser.add_argument("--videos", type=int, default=128, help="generated videos per row and sampling seed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder, videos = arguments.keep, Videos.draw(captions=False, shape=Resolution(32, 32), seed=0)
    vae = autoencoder(folder, [videos], [], arguments.seed)
    teacher = trained_pipeline(folder, vae, [videos], [], arguments.seed)
    student = distill(teacher, *encode(vae, videos.train, STEP), arguments.student, arguments.seed)
    student.save_pretrained(str(folder / "student"))
    report(teacher, student, videos.test, arguments.videos, folder)


def distill(
    teacher: ARDiffusionPipeline, clips: Tensor, labels: Tensor, settings: list[str], seed: int
) -> ARDiffusionPipeline:
    """A student of the teacher. Prints what it cost."""
    tree = read_settings(files("distill.yaml", False), [*settings, f"train.seed={seed}"])
    tree.pop(COMMAND)
    config = build(DistillConfig, tree)
    diffusion = diffusion_of_student(config.task, teacher.diffusion)
    model = make_dit(teacher.dit.config)
    model.load_state_dict(teacher.dit.state_dict())
    task = DistillTask(model, teacher.dit, config.task, diffusion, teacher.statistics)
    dit = run(task, config.train, latent_batches(clips, labels, torch.zeros_like(labels), config.train, seed + 21))
    training = load_config(TrainDiTConfig, files("train_dit.yaml", False))
    trained_on = training.train.num_steps * training.train.batch_size
    forced = 1 + training.task.teacher_forcing  # such clips are evaluated twice
    whole = round(trained_on * (FRAMES * forced + training.task.openings * training.task.opening_frames))
    by_teacher, by_student = (
        config.train.num_steps * config.train.batch_size * count for count in evaluations_of_update(config.task, FRAMES)
    )
    share, weighted = (by_teacher + by_student) / whole, (by_teacher + 3 * by_student) / (3 * whole)
    print(
        f"evaluations: {by_teacher:.0f} by the teacher, {by_student:.0f} by the student, {share:.1%} of the teacher's"
    )
    print(f"{whole} in training; {weighted:.1%} if a backward pass counts as two evaluations")
    return ARDiffusionPipeline(teacher.vae, dit, diffusion, teacher.statistics, teacher.class_names)


def report(teacher: ARDiffusionPipeline, student: ARDiffusionPipeline, test: Tensor, count: int, folder: Path) -> None:
    """Prints a row for each setting of the teacher and each number of steps of the student, and the differences to the
    first two, seed by seed."""
    network = RandomVideoFeatures(0)
    reference, real = (network(part[:, :FRAMES]) for part in (test[:128], test[128:]))
    assert student.info.student is not None
    settings = {name: (teacher, {**params, "guidance_scale": GUIDANCE}) for name, params in TEACHER.items()}
    for steps in range(1, len(student.info.student.timesteps) + 1):
        name = f"student, S = {steps}"
        settings[name] = (student, {"num_inference_steps": steps, "guidance_scale": 1.0})
    header("setting", ["evaluations", "CPU s", "distance", *SHOWN])
    row("real clips", ["", "", f"{distance(reference, real):.1f}", *[""] * len(SHOWN)])
    results: dict[str, np.ndarray] = {}
    for name, (pipeline, params) in settings.items():
        cpu, values = 0.0, []
        for seed in SEEDS:
            started = time.process_time()
            videos = generate(pipeline, count, seed, **params)
            cpu += (time.process_time() - started) / len(SEEDS)
            values.append([distance(reference, network(torch.from_numpy(videos))), *measures(videos).values()])
            if seed == 0:
                sheet = contact_sheet(videos[:8], [*CLASSES, *CLASSES])
                (folder / f"{name.replace(' ', '')}.png").write_bytes(sheet)
        complete = validate(SamplingParams(num_frames=FRAMES, **params), pipeline.info)
        results[name] = np.array(values)  # (seeds, measures)
        evaluations = frame_evaluations(complete, FRAMES)
        row(name, [str(evaluations), f"{cpu:.1f}", *map(with_interval, results[name].T)])
    print("\nDifferences to the setting in brackets, seed by seed:")
    header("setting", ["distance", *SHOWN])
    for name in list(settings)[2:]:
        for other in list(TEACHER)[:2]:
            row(f"{name} ({other})", [with_interval(v) for v in (results[name] - results[other]).T])


def distance(reference: Tensor, features: Tensor) -> float:
    """The distance of the quick evaluation between features ``(V, D)``."""
    sets = (scale_features(reference, values).numpy()[:, None] for values in (reference, features))
    return float(Frechet(ddof=1)(*sets))


def with_interval(values: np.ndarray) -> str:
    """The mean over seeds and Student's 95 % interval."""
    estimate = estimate_mean(values.tolist())
    half = estimate.high - estimate.mean
    digits = 1 if abs(values.mean()) >= 5 else 3
    return f"{values.mean():.{digits}f} ± {half:.{digits}f}"


if __name__ == "__main__":
    main()
