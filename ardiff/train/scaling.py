"""What a run on many GPUs asks of storage, and what failures cost it: formulas for planning, beside those of
:mod:`ardiff.train.estimate`. `docs/scaling.md` has the figures for 8, 64 and 512 GPUs."""

import math

from ardiff.train.estimate import MASTER_BYTES

PART_BYTES = 8 * 2**20
"""Size of the parts in which large objects are uploaded, boto3's default."""
PARTS_OF_A_CHECKPOINT = 3
"""Files that a worker writes: weights, average, optimizer state."""


def latent_bytes(num_frames: int, num_tokens: int, token_dim: int) -> int:
    """Bytes of a clip's latents, float32, in memory. In Parquet up to a third more, for its list of distinct values."""
    return 4 * num_frames * num_tokens * token_dim


def read_rate(updates_per_second: float, batch_size: int, sample_bytes: float) -> float:
    """Bytes per second that training reads."""
    return updates_per_second * batch_size * sample_bytes


def clip_reads(num_clips: int, clips_per_visit: int, num_workers: int) -> int:
    """Requests that read clips of videos below 20 MB, at most: one a visit, and by every worker that takes part in it.

    Workers share the clips of a visit, which are shuffled. With ``clips_per_visit`` 1 it is exact.
    """
    return math.ceil(num_clips / clips_per_visit) * min(clips_per_visit, num_workers)


def latent_reads(num_files: int, num_workers: int) -> int:
    """Requests of an epoch on stored latents, at most: every worker reads every file, and keeps its share of the clips.

    It reads fewer where a chunk of files holds fewer clips than a batch.
    """
    return num_files * num_workers


def checkpoint_bytes(parameters: int) -> int:
    """Bytes of a checkpoint: weight, average and two moments of every parameter in float32, on all workers together."""
    return MASTER_BYTES * parameters


def checkpoint_seconds(parameters: int, num_gpus: int, upload_rate: float) -> float:
    """Seconds to store a checkpoint, of which every worker uploads its share at ``upload_rate`` bytes per second."""
    return checkpoint_bytes(parameters) / num_gpus / upload_rate


def checkpoint_requests(parameters: int, num_gpus: int) -> int:
    """Requests that store a checkpoint, at most: begin, parts and end of every file, and two small files."""
    size = checkpoint_bytes(parameters) / num_gpus / PARTS_OF_A_CHECKPOINT
    return num_gpus * PARTS_OF_A_CHECKPOINT * (math.ceil(2 * size / PART_BYTES) + 2) + 2


def time_between_failures(num_machines: int, hours_of_a_machine: float) -> float:
    """Mean seconds until any of the machines fails, if one alone lives ``hours_of_a_machine`` on average."""
    return 3600 * hours_of_a_machine / num_machines


def best_checkpoint_interval(seconds: float, between_failures: float) -> float:
    """Seconds of work between checkpoints that take ``seconds``, for the least loss (Young, 1974)."""
    return math.sqrt(2 * seconds * between_failures)


def lost_share(interval: float, seconds: float, between_failures: float, restart: float) -> float:
    """Share of the time that is lost: to checkpoints, to work done twice, and to restarts of ``restart`` seconds.

    Of first order: good while interval, checkpoint and restart are short beside the time between failures.
    """
    return seconds / interval + (interval / 2 + seconds + restart) / between_failures


def sampling_flops(num_frames: int, num_inference_steps: int, frame_flops: float, guided: bool = False) -> float:
    """Operations of a video no longer than the model: ``F S + F - 1`` evaluations of a frame, twice with guidance.

    For longer ones see :func:`ardiff.sampling.cost.frame_evaluations`.
    """
    return (num_frames * num_inference_steps + num_frames - 1) * frame_flops * (2 if guided else 1)
