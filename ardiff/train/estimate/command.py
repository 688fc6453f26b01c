"""Estimates memory and time of a training step under each ZeRO stage, and GPU hours and price of the jobs.

ardiff estimate model=vae micro_batch_size=2 activation_checkpointing=true
"""

from dataclasses import dataclass

from ardiff.train.estimate.config import EstimateConfig
from ardiff.train.estimate.counts import (
    FVD_FRAMES,
    count_step,
    distillation_flops,
    encoder_flops,
    i3d_flops,
    video_flops,
)
from ardiff.train.estimate.zero import estimate_stages, recommended

__all__ = ["EstimateConfig", "run"]


@dataclass(frozen=True, slots=True)
class JobEstimate:
    """GPU hours of a job, summed over all GPUs."""

    name: str
    work: str
    gpu_hours: float


def training_gpu_hours(config: EstimateConfig) -> float | None:
    """Upper bound of the GPU hours of training under the recommended stage; None if no stage fits."""
    stage = recommended(config, estimate_stages(config))
    return None if stage is None else config.work.num_updates * stage.seconds * config.num_gpus / 3600


def estimate_jobs(config: EstimateConfig) -> list[JobEstimate]:
    """GPU hours of training and, for the AR-DiT, of encoding, sampling, evaluation and endpoint."""
    work, jobs = config.work, list[JobEstimate]()
    if (training := training_gpu_hours(config)) is not None:
        jobs.append(JobEstimate(f"train-{config.model}", f"{work.num_updates} updates", training))
    if config.model == "vae":
        return jobs
    if work.distill_updates:
        distillation = work.distill_updates * distillation_flops(config) / config.rate / 3600
        jobs.append(JobEstimate("distill", f"{work.distill_updates} updates, with the teacher's", distillation))
    clip_flops, params = config.num_frames * encoder_flops(config.vae), config.sampling_params()
    clips = f"{work.num_clips} clips of {config.num_frames} frames"
    jobs.append(JobEstimate("encode", clips, work.num_clips * clip_flops / config.rate / 3600))
    steps = f"{params.num_inference_steps} step{'s' * (params.num_inference_steps != 1)}"
    videos = f"{work.num_videos} videos of {params.num_frames} frames, {steps}"
    video = video_flops(config)
    jobs.append(JobEstimate("sweep", videos, work.num_videos * video / config.rate / 3600))
    scoring = work.num_scored * i3d_flops() / (work.float32_tflops * 1e12 * config.utilisation)
    jobs.append(JobEstimate("evaluate", f"{work.num_scored} clips of {FVD_FRAMES} frames", scoring / 3600))
    throughput = work.replicas * 3600 * config.rate / video
    endpoint = (
        f"replicas: {work.replicas}, for {work.endpoint_hours:g} hours; at most {throughput:.0f} such videos an hour"
    )
    return [*jobs, JobEstimate("endpoint", endpoint, work.replicas * work.endpoint_hours)]


def run(config: EstimateConfig) -> None:
    """Prints the tables."""
    counts, stages = count_step(config), estimate_stages(config)
    choice = recommended(config, stages)
    print(
        f"{counts.parameters / 1e6:.1f} M parameters, {counts.flops / 1e12:.2f} TFLOP forward and "
        f"{counts.activations / 2**30:.1f} GiB of activations per micro-batch of {config.micro_batch_size}"
    )
    print("ZeRO stage   states GiB   bucket GiB   activations GiB   all GiB   compute s   exchange s (at most)")
    for s in stages:
        mark = "  <- choose" if s == choice else ""
        print(
            f"{s.stage:10d} {s.states / 2**30:12.1f} {s.bucket / 2**30:12.1f} {s.activations / 2**30:17.1f} "
            f"{s.memory / 2**30:9.1f} {s.compute_seconds:11.2f} {s.exchange_seconds:12.2f}{mark}"
        )
    if choice is None:
        print("No stage fits: set activation_checkpointing=true, a smaller micro_batch_size, or offload the optimizer.")
    print(f"{'job':<10} {'what it does':<60} {'GPU hours':>10} {'dollars':>8}")
    for job in estimate_jobs(config):
        print(f"{job.name:<10} {job.work:<60} {job.gpu_hours:10.2f} {job.gpu_hours * config.work.gpu_dollars:8.2f}")
