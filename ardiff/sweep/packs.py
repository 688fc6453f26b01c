"""Packs: rows of one cell that are made together, each stored as soon as it is made, smaller ones where that fails.

A row's frames do not depend on its pack (on CPUs to the last bit, see docs/sweeps.md), so a pack that fails is halved
until what fails stands alone.
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
from ardiff.sampling.params import SamplingParams
from ardiff.sweep.rows import Record, VideoRow, read_complete, read_record, write_record
from ardiff.sweep.statistics import video_statistics
from ardiff.vae import DecoderCache

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tries:
    """How often a row has been begun."""

    total: int = 0
    alone: int = 0
    """In a pack of its own."""


def pack_rows(rows: Sequence[VideoRow], size: int) -> list[list[VideoRow]]:
    """Rows in packs of at most ``size``, in their order; a pack's rows are of one cell and go to one kind of file."""
    packs: list[list[VideoRow]] = []
    for row in rows:
        last = packs[-1] if packs else None
        if last is None or len(last) == size or _together(last[0]) != _together(row):
            packs.append(last := [])
        last.append(row)
    return packs


def in_order(packs: list[list[VideoRow]]) -> list[list[VideoRow]]:
    """Packs as they are to be made: the quickest quarter last, so that no actor is left with a long one at the end.

    Each part is begun at a random place, so that jobs on the same rows do different ones first.
    """
    passes = [sequential_passes(_params(p[0])) for p in packs]
    limit = sorted(passes)[max(len(packs) // 4 - 1, 0)]
    order: list[list[VideoRow]] = []
    for quick in (False, True):
        part = [pack for pack, count in zip(packs, passes, strict=True) if (count <= limit) is quick]
        turn = secrets.randbelow(len(part)) if part else 0
        order += part[turn:] + part[:turn]
    return order


def _together(row: VideoRow) -> VideoRow:
    """What rows of a pack share."""
    label = min(row.label, 0)  # classes may differ, but not whether there is one
    return replace(row, id="", label=label, class_name="", seed=0, uri="", latents=str(bool(row.latents)), record="")


def _params(row: VideoRow) -> SamplingParams:
    return SamplingParams(
        num_frames=row.num_frames,
        num_inference_steps=row.num_inference_steps,
        ar_step=row.ar_step,
        guidance_scale=row.guidance_scale,
        mode=row.mode,
        class_label=None if row.label < 0 else row.label,
        seed=row.seed,
    )


def make_rows(
    rows: Sequence[VideoRow],
    make: Callable[[list[VideoRow], list[int]], Iterator[Record]],
    begin: Callable[[list[VideoRow]], None],
    tried: dict[str, Tries],
    attempts: int,
) -> Iterator[Record]:
    """Records of the rows of a pack, each of which is made, or has failed ``attempts`` times alone.

    A pack that fails is halved. Where the process died while rows were in work, ``tried`` says how often: they go on in
    packs halved as often, since what killed it may do so again.

    Args:
        rows: Of one pack.
        make: Makes rows together and stores them; yields a record for each. Also given how often each has been begun.
        begin: Told of rows before they are tried.
        tried: What has been tried before, by row id; rows that are missing were not.
        attempts: At least 1.

    Raises:
        StorageError: A file could not be stored; what is the matter there is not the row's fault.
        CheckpointError: Nor what is the matter with the models.
    """
    tries = {row.id: tried.get(row.id, Tries()) for row in rows}
    died = max((t.total for t in tries.values()), default=0)
    waiting = deque(pack_rows(rows, max(len(rows) >> died, 1)))
    errors: dict[str, Exception] = {}
    while waiting:
        pack = waiting.popleft()
        row, alone = pack[0], len(pack) == 1
        if alone and tries[row.id].alone >= attempts:
            error = errors.get(row.id)
            before = read_record(row) if error is None else None
            if before is not None and before.status == "failed" and before.attempts >= tries[row.id].total:
                yield before  # it had failed for good before the process died, of another row
                continue
            error = error or RuntimeError("the process that made it died each time, perhaps of its memory")
            yield record_failure(row, type(error).__name__, str(error), tries[row.id].total)
            continue
        begin(pack)
        for r in pack:
            tries[r.id] = Tries(tries[r.id].total + 1, tries[r.id].alone + alone)
        made = set()
        try:
            for record in make(pack, [tries[r.id].total for r in pack]):
                made.add(record.id)
                yield record
        except (StorageError, CheckpointError):
            raise
        except Exception as error:
            _free(error)
            left = [r for r in pack if r.id not in made]
            errors |= {r.id: error for r in left}
            half = (len(left) + 1) // 2
            waiting.extendleft(part for part in ([left] if alone else [left[half:], left[:half]]) if part)


def _free(error: Exception) -> None:
    """Lets go of what the failed pack held, its frames in the traceback included.

    A device that has failed fails everything after it, so then this process ends; another one tries the rows again.
    """
    if isinstance(error, torch.AcceleratorError):
        logger.error("The device has failed.", exc_info=error)
        os._exit(1)
    error.__traceback__ = None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def record_failure(row: VideoRow, error: str, message: str, tries: int) -> Record:
    """Records that a row could not be made, unless another job has made it meanwhile; returns what holds now."""
    complete = read_complete(row)
    if complete is not None:
        return complete
    record = Record(id=row.id, status="failed", error=error, message=message.strip()[:2000], attempts=tries)
    write_record(row, record)
    return record


def make_pack(
    pipeline: ARDiffusionPipeline,
    pack: Sequence[VideoRow],
    tries: Sequence[int],
    on_frames: Callable[[int], None] = lambda frames: None,
) -> Iterator[Record]:
    """Makes the rows of a pack together and stores each: latents if they are kept, the file, then the record.

    Args:
        pipeline: With the weights that the rows name.
        pack: As :func:`pack_rows` makes them.
        tries: How often each row has been begun, for its record.
        on_frames: Called with the number of frames that are final of each video.

    Raises:
        ValueError: A setting is out of range.
        StorageError: A file cannot be stored.
    """
    begun, started, processor = time.time(), time.perf_counter(), time.process_time()
    first = pack[0]
    parts, pictures, cache = [], [], DecoderCache()
    params = [_params(row) for row in pack]
    for latents in pipeline.stream_latents(params):
        if first.latents:
            parts.append(latents.cpu())
        # Twice where it is one: a CPU rounds products of a single video's few rows otherwise than those of several.
        shown = latents if len(pack) > 1 else latents.repeat(2, 1, 1, 1)
        for picture in pipeline.decode(shown, cache):
            pictures.append(picture[: len(pack)].numpy())
            on_frames(len(pictures))
    videos = np.stack(pictures, axis=1)  # (B, F, H, W, 3)
    kept = torch.cat(parts, dim=1) if parts else None  # (B, F, L, D)
    sampled, used = (time.perf_counter() - started) / len(pack), (time.process_time() - processor) / len(pack)
    evaluations = frame_evaluations(params[0], pipeline.dit.config.num_frames)
    for index, (row, video, attempts) in enumerate(zip(pack, videos, tries, strict=True)):
        started, processor = time.perf_counter(), time.process_time()
        encoded = encode_video(video, row.fps, row.codec, row.crf)
        tensors = b"" if kept is None else safetensors.torch.save({"latents": kept[index].contiguous()})
        if row.latents:
            storage.write_bytes(row.latents, tensors)
        storage.write_bytes(row.uri, encoded)
        seconds = sampled + time.perf_counter() - started
        record = Record(
            id=row.id,
            status="ok",
            size=len(encoded),
            file_sha256=hashlib.sha256(encoded).hexdigest(),
            frames_sha256=hashlib.sha256(video.tobytes()).hexdigest(),
            latents_size=len(tensors),
            seconds=seconds,
            cpu_seconds=used + time.process_time() - processor,
            started=begun,
            finished=time.time(),
            frames_per_second=row.num_frames / seconds,
            evaluations=evaluations,
            pack=len(pack),
            worker=f"{platform.node()}:{os.getpid()}",
            device=_device_name(pipeline.device),
            attempts=attempts,
            statistics=video_statistics(video),
        )
        write_record(row, record)
        yield record


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
