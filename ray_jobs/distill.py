"""Distills a pipeline into a student that needs one to four sampling steps and no guidance, from stored latents.

python -m ray_jobs.distill teacher=runs/quickstart/dit/pipeline latents=runs/quickstart/latents/FINGERPRINT
"""

import copy
import functools
import sys
from collections.abc import Callable

from torch import Tensor

from ardiff.cli import main
from ardiff.config import fingerprint
from ardiff.diffusion.config import DiffusionConfig
from ardiff.models import make_dit
from ardiff.pretrained import fingerprint_of, load_autoencoder
from ardiff.train.export import describe_dit
from ardiff.train.initial import initialise_dit
from ardiff.train.tasks import DistillTask
from ardiff.train.tasks.distill import diffusion_of_student
from ray_jobs.runtime.cluster import ray_cluster
from ray_jobs.runtime.stages import record_run, stage
from ray_jobs.training.config import DistillConfig
from ray_jobs.training.dit_data import check_sizes, make_stream, stored_texts
from ray_jobs.training.job import TrainJob, loss_note
from ray_jobs.training.teacher import Teacher, check_texts, read_teacher, teacher_latents
from ray_jobs.training.trainer import run_training


def run(config: DistillConfig, key: str = "") -> None:
    """Trains to the end; resumes an interrupted run of the same configuration. Raises ArdiffError."""
    teacher = read_teacher(config.teacher)
    latents, training = teacher_latents(config, teacher), teacher.training(config)
    check_sizes(training, latents)
    texts = stored_texts(training, latents)
    check_texts(texts, teacher)
    diffusion = diffusion_of_student(config.task, teacher.diffusion)
    with ray_cluster(config.train.num_workers * config.train.cpu_threads + 2):
        stream, source = make_stream(training, latents, [], texts, None)
        job = TrainJob(
            name="student",
            folder=config.output,
            fingerprint=fingerprint(fingerprint_of(teacher.uri), config.task, config.train.resume_key, source),
            config=config.train,
            stream=stream,
            make_task=functools.partial(make_task, config, teacher, diffusion),
            record=functools.partial(record_run, config.output, config),
            description=describe_dit(teacher.dit, diffusion, latents, teacher.class_names, teacher.text_encoder),
            result=config.pipeline,
            resume=config.resume,
        )
        with stage("distill", config.output, key) as record:
            history = run_training(job)
            record.note = loss_note(history)
            record.results = {"history": history}


def make_task(config: DistillConfig, teacher: Teacher, diffusion: DiffusionConfig) -> DistillTask:
    """The task of a student with ``diffusion``, which starts from the teacher's weights."""
    frozen = make_dit(teacher.dit)
    initialise_dit(teacher.uri, frozen, new_layers=False)
    student = copy.deepcopy(frozen)
    decode: Callable[[Tensor], Tensor] | None = None
    if config.train.sample_every:
        vae = load_autoencoder(teacher.uri)

        def decode(z: Tensor) -> Tensor:
            return vae.to(z.device).decode_long(z)

    return DistillTask(student, frozen, config.task, diffusion, teacher.statistics, decode)


if __name__ == "__main__":
    raise SystemExit(main(["distill", *sys.argv[1:]]))
