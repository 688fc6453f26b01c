"""Formulas for planning runs on many GPUs: load on storage, and the cost of failures.

``docs/scaling.md`` has the figures for 8, 64 and 512 GPUs.
"""

import math

from ardiff.train.estimate.zero import MASTER_BYTES

UPLOAD_PART_BYTES = 8 * 2**20
"""Size of the parts of an S3 multipart upload, boto3's default."""
FILES_PER_SHARD = 3
"""Files that a rank writes per checkpoint: weights, EMA, optimizer state."""


def latent_bytes(num_frames: int, num_tokens: int, token_dim: int) -> int:
    """Bytes of a clip's latents in memory, float32. Parquet's dictionary takes up to a third more."""
    return 4 * num_frames * num_tokens * token_dim


def read_rate(updates_per_second: float, batch_size: int, sample_bytes: float) -> float:
    """Bytes per second that training reads."""
    return updates_per_second * batch_size * sample_bytes


def clip_reads(num_clips: int, clips_per_visit: int, num_workers: int) -> int:
    """Upper bound of the requests that read clips of videos below 20 MB: one per visit and rank that takes part in it.

    The clips of a visit are shuffled over the ranks. Exact for ``clips_per_visit`` 1.
    """
    return math.ceil(num_clips / clips_per_visit) * min(clips_per_visit, num_workers)


def latent_reads(num_files: int, num_workers: int) -> int:
    """Upper bound of the requests of an epoch on stored latents: every rank reads every file and keeps its clips.

    There are fewer if a chunk of files has fewer clips than a batch.
    """
    return num_files * num_workers


def checkpoint_bytes(parameters: int) -> int:
    """Bytes of a checkpoint over all ranks: weight, EMA and two moments of every parameter in float32."""
    return MASTER_BYTES * parameters


def checkpoint_seconds(parameters: int, num_gpus: int, upload_rate: float) -> float:
    """Seconds to store a checkpoint if every rank uploads its shard at ``upload_rate`` bytes per second."""
    return checkpoint_bytes(parameters) / num_gpus / upload_rate


def checkpoint_requests(parameters: int, num_gpus: int) -> int:
    """Upper bound of the requests to store a checkpoint: start, parts and end of every file, and two small files."""
    size = checkpoint_bytes(parameters) / num_gpus / FILES_PER_SHARD
    return num_gpus * FILES_PER_SHARD * (math.ceil(2 * size / UPLOAD_PART_BYTES) + 2) + 2


def time_between_failures(num_machines: int, hours_per_machine: float) -> float:
    """Mean seconds until any machine fails, if one machine lasts ``hours_per_machine`` on average."""
    return 3600 * hours_per_machine / num_machines


def best_checkpoint_interval(seconds: float, between_failures: float) -> float:
    """Seconds of work between checkpoints of ``seconds`` each that lose the least time (Young, 1974)."""
    return math.sqrt(2 * seconds * between_failures)


def lost_share(interval: float, seconds: float, between_failures: float, restart: float) -> float:
    """Share of the time lost to checkpoints, to repeated work, and to restarts of ``restart`` seconds.

    A first-order formula: accurate if interval, checkpoint and restart are short compared with ``between_failures``.
    """
    return seconds / interval + (interval / 2 + seconds + restart) / between_failures
