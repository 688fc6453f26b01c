"""Batches of videos: generation, storage, and retries in smaller batches.

The frames of a video do not depend on its batch (on CPUs not in a single bit, see docs/sweeps.md). So a batch that
fails is halved until the failing video is alone.
"""

import hashlib
import logging
import os
import platform
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import safetensors.torch
import torch

from ardiff.data import storage
from ardiff.data.encode import encode_video
from ardiff.errors import CheckpointError, StorageError
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.sampling.cost import frame_evaluations, sequential_passes
from ardiff.sweep.specs import Record, VideoSpec, read_complete, read_record, write_record
from ardiff.sweep.statistics import video_statistics
from ardiff.vae import DecoderCache

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Attempts:
    """How often the generation of a video has been started."""

    total: int = 0
    alone: int = 0
    """In a batch of one."""


def make_batches(specs: Sequence[VideoSpec], size: int) -> list[list[VideoSpec]]:
    """Splits specs into batches of at most ``size``, in their order. The specs of a batch can be sampled together and
    are stored in the same format."""
    batches: list[list[VideoSpec]] = []
    for spec in specs:
        last = batches[-1] if batches else None
        if last is None or len(last) == size or _batch_key(last[0]) != _batch_key(spec):
            batches.append(last := [])
        last.append(spec)
    return batches


def _batch_key(spec: VideoSpec) -> tuple[object, ...]:
    """Equal for specs that can share a batch: classes may differ, but all have one or none has."""
    sampling = spec.sampling
    return (
        replace(spec, id="", class_name="", sampling=sampling.shared(), uri="", latents="", record=""),
        bool(spec.latents),
        sampling.class_label is None,
    )


def schedule_batches(batches: list[list[VideoSpec]]) -> list[list[VideoSpec]]:
    """Batches in the order of generation: the fastest quarter last, so that no worker ends with a slow batch.

    Both groups start at a random batch, so that several jobs on the same specs start with different ones.
    """
    passes = [sequential_passes(batch[0].sampling) for batch in batches]
    limit = sorted(passes)[max(len(batches) // 4 - 1, 0)]
    order: list[list[VideoSpec]] = []
    for fast in (False, True):
        group = [batch for batch, count in zip(batches, passes, strict=True) if (count <= limit) is fast]
        start = secrets.randbelow(len(group)) if group else 0
        order += group[start:] + group[:start]
    return order


def generate_with_retries(
    specs: Sequence[VideoSpec],
    generate: Callable[[list[VideoSpec], list[int]], Iterator[Record]],
    on_start: Callable[[list[VideoSpec]], None],
    earlier: dict[str, Attempts],
    max_attempts: int,
) -> Iterator[Record]:
    """Yields a record for each spec of a batch, which is either complete or has failed ``max_attempts`` times alone.

    A batch that fails is halved. ``earlier`` counts attempts whose process crashed: the batch is halved once for each
    of them, since what crashed it may crash it again.

    Args:
        specs: The specs of one batch.
        generate: Generates and stores specs together; takes the attempts of each, and yields a record for each.
        on_start: Called with the specs of each attempt before it starts.
        earlier: Attempts before this call, by spec id; specs without any may be missing.
        max_attempts: At least 1.

    Raises:
        StorageError: A file could not be stored. The spec is not the cause, so it does not count as failed.
        CheckpointError: The pipeline could not be loaded; neither is the spec the cause of that.
    """
    attempts = {spec.id: earlier.get(spec.id, Attempts()) for spec in specs}
    crashes = max((a.total for a in attempts.values()), default=0)
    waiting = deque(make_batches(specs, max(len(specs) >> crashes, 1)))
    errors: dict[str, Exception] = {}
    while waiting:
        batch = waiting.popleft()
        alone = len(batch) == 1
        if alone and attempts[batch[0].id].alone >= max_attempts:
            yield _give_up(batch[0], attempts[batch[0].id].total, errors.get(batch[0].id))
            continue
        on_start(batch)
        for spec in batch:
            attempts[spec.id] = Attempts(attempts[spec.id].total + 1, attempts[spec.id].alone + alone)
        generated = set()
        try:
            for record in generate(batch, [attempts[spec.id].total for spec in batch]):
                generated.add(record.id)
                yield record
        except (StorageError, CheckpointError):
            raise
        except Exception as error:
            _free_memory(error)
            left = [spec for spec in batch if spec.id not in generated]
            errors |= {spec.id: error for spec in left}
            half = (len(left) + 1) // 2
            waiting.extendleft(part for part in ([left] if alone else [left[half:], left[:half]]) if part)


def _give_up(spec: VideoSpec, attempts: int, error: Exception | None) -> Record:
    """The failed record of a spec; the stored one if the spec had failed before its process crashed."""
    if error is None:
        stored = read_record(spec)
        if stored is not None and stored.status == "failed" and stored.attempts >= attempts:
            return stored
        error = RuntimeError("the process that generated it crashed each time, perhaps for lack of memory")
    return record_failure(spec, type(error).__name__, str(error), attempts)


def _free_memory(error: Exception) -> None:
    """Frees the memory of a failed batch, which the traceback keeps alive.

    After a device failure every further operation fails, so this process exits and another one tries the specs again.
    """
    if isinstance(error, torch.AcceleratorError):
        logger.error("The device has failed.", exc_info=error)
        os._exit(1)
    error.__traceback__ = None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def record_failure(spec: VideoSpec, error: str, message: str, attempts: int) -> Record:
    """Writes and returns a failed record, unless another job has completed the spec: then returns that record."""
    complete = read_complete(spec)
    if complete is not None:
        return complete
    record = Record(id=spec.id, status="failed", error=error, message=message.strip()[:2000], attempts=attempts)
    write_record(spec, record)
    return record


def generate_batch(
    pipeline: ARDiffusionPipeline,
    batch: Sequence[VideoSpec],
    attempts: Sequence[int],
    on_frames: Callable[[int], None] = lambda frames: None,
) -> Iterator[Record]:
    """Generates the specs of a batch together and stores each: latents if they are kept, the video, then the record.

    Args:
        pipeline: The pipeline that the specs name.
        batch: From :func:`make_batches`.
        attempts: Attempts of each spec, for its record.
        on_frames: Called with the number of final frames of each video.

    Raises:
        ValueError: A parameter is out of range.
        StorageError: A file cannot be stored.
    """
    start, clock = time.time(), _Clock()
    params = [spec.sampling for spec in batch]
    videos, latents = _sample(pipeline, batch, on_frames)
    sampled = clock.read()
    for index, (spec, video) in enumerate(zip(batch, videos, strict=True)):
        clock = _Clock()
        encoded = encode_video(video, spec.fps, spec.codec, spec.crf)
        tensors = b"" if latents is None else safetensors.torch.save({"latents": latents[index].contiguous()})
        if spec.latents:
            storage.write_bytes(spec.latents, tensors)
        storage.write_bytes(spec.uri, encoded)
        seconds, cpu_seconds = (shared / len(batch) + own for shared, own in zip(sampled, clock.read(), strict=True))
        record = Record(
            id=spec.id,
            status="ok",
            file_size=len(encoded),
            file_sha256=hashlib.sha256(encoded).hexdigest(),
            frames_sha256=hashlib.sha256(video.tobytes()).hexdigest(),
            latents_size=len(tensors),
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            started=start,
            finished=time.time(),
            frames_per_second=spec.sampling.num_frames / seconds,
            evaluations=frame_evaluations(params[0], pipeline.info.num_frames),
            batch_size=len(batch),
            worker=f"{platform.node()}:{os.getpid()}",
            device=_device_name(pipeline.device),
            attempts=attempts[index],
            statistics=video_statistics(video),
        )
        write_record(spec, record)
        yield record


def _sample(
    pipeline: ARDiffusionPipeline, batch: Sequence[VideoSpec], on_frames: Callable[[int], None]
) -> tuple[np.ndarray, torch.Tensor | None]:
    """Frames, uint8 ``(B, F, H, W, 3)``, and latents ``(B, F, L, D)`` if the batch keeps them."""
    chunks, frames, cache, shape = [], [], DecoderCache(), pipeline.info.shape_of(batch[0].sampling)
    for latents in pipeline.stream_latents([spec.sampling for spec in batch]):
        if batch[0].latents:
            chunks.append(latents.cpu())
        # A single video is decoded twice: CPUs round the products of its few rows differently than those of several.
        repeated = latents if len(batch) > 1 else latents.repeat(2, 1, 1, 1)
        for frame in pipeline.decode(repeated, cache, shape):
            frames.append(frame[: len(batch)].numpy())
            on_frames(len(frames))
    return np.stack(frames, axis=1), torch.cat(chunks, dim=1) if chunks else None


class _Clock:
    """Wall and processor time since its creation."""

    def __init__(self) -> None:
        self._start = (time.perf_counter(), time.process_time())

    def read(self) -> tuple[float, float]:
        """Seconds of wall and of processor time."""
        return time.perf_counter() - self._start[0], time.process_time() - self._start[1]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
