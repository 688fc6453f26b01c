"""The loop of one model: jobs join and leave the packed engine between iterations, frames leave as video at once.

Two threads: one makes the engine's iterations, the other decodes and encodes what the iteration before has finished.
Everything that can fail fails for one job: only a failing iteration concerns several, and then they are repeated in
smaller groups until the one that is to blame is alone.
"""

import asyncio
import hashlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from ardiff.errors import ArdiffError
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.sampling.request import FinishedFrames, SampleRequest
from ardiff.serving.config import ServiceConfig
from ardiff.serving.fragments import FragmentWriter
from ardiff.serving.metrics import Recorder
from ardiff.serving.records import JobRecord
from ardiff.serving.requests import sample_request
from ardiff.vae import DecoderCache

logger = logging.getLogger(__name__)


class JobError(ArdiffError):
    """Why a job failed: a kind, and a sentence for the client."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class FragmentLog:
    """The video of a running job so far. Kept whole, so readers that stall cost nothing and late ones see all."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.size = 0
        self.ended = False
        self.failure: JobError | None = None
        self._changed = asyncio.Event()

    def add(self, data: bytes) -> None:
        """Appends a part."""
        self.parts.append(data)
        self.size += len(data)
        self._tell()

    def end(self, failure: JobError | None = None) -> None:
        """No part will follow; with a failure, what is there is no whole video."""
        self.ended, self.failure = True, failure
        self._tell()

    async def follow(self) -> AsyncIterator[bytes]:
        """All parts, as they come. Raises the JobError that ended an incomplete video."""
        sent = 0
        while True:
            while sent < len(self.parts):
                fresh, sent = self.parts[sent:], len(self.parts)
                yield b"".join(fresh)  # a reader that lags gets fewer, larger parts
            if self.ended:
                break
            await self._changed.wait()
        if self.failure is not None:
            raise self.failure

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class Job:
    """A job that this replica holds the lease of."""

    def __init__(self, record: JobRecord, given: np.ndarray | None) -> None:
        self.record = record
        self.given = given
        self.log = FragmentLog()
        self.deadline: float | None = None
        """When the job is to fail, by the monotonic clock; set when it starts."""
        self.stop: JobError | None = None
        """Set by anybody to have the job stopped before the next iteration; its kind ``cancelled`` is no error."""
        self.work: _Work | None = None
        """Its place in the engine, once it has one."""
        self.writing = asyncio.Lock()
        """Held while the record or a part of the video is written, so that the last word is the last."""
        self.beat: asyncio.Task[None] | None = None
        """Its last sign of life, which may still be on its way to storage."""
        self.told: JobRecord | None = None
        """The record as other replicas know it."""
        self.told_parts, self.segments = 0, 0


Ended = Callable[[Job, JobError | None, str | None], None]


class ModelRunner:
    """Runs the jobs of one model. ``ended(job, failure, frames_sha256)`` is called when one has left."""

    def __init__(
        self, name: str, pipeline: ARDiffusionPipeline, config: ServiceConfig, metrics: Recorder, ended: Ended
    ) -> None:
        self.name, self.pipeline, self.config, self.metrics = name, pipeline, config, metrics
        self.engine = pipeline.engine(config.engine)
        self._tell = ended
        self._alone = False
        self.here = 0
        """Jobs, of which those on their way into the engine are in none of the queues."""
        self._waiting: deque[Job] = deque()
        self._active: dict[int, _Work] = {}
        self._suspects: deque[Job] = deque()
        self._together = 1
        self._wake = asyncio.Event()
        self._sent: deque[tuple[float, int]] = deque()
        self._stepper = ThreadPoolExecutor(1, f"steps of {name}")
        self._deliverer = ThreadPoolExecutor(1, f"frames of {name}")

    @property
    def room(self) -> int:
        """Jobs that could start now: none beside one whose replica has died before."""
        return 0 if self._alone else max(0, self.config.engine.max_requests - self.here)

    def check(self, request: SampleRequest) -> SampleRequest:
        """Raises ValueError or EngineLimitError for what the engine would refuse."""
        return self.engine.check(request)

    @property
    def busy(self) -> bool:
        """Whether any job is here."""
        return self.here > 0

    def start(self, job: Job) -> None:
        """Takes a job, which joins at the next iteration that has room."""
        self.here += 1
        self._alone = self._alone or job.record.deaths > 0
        self._waiting.append(job)
        self._wake.set()

    def stop(self, job: Job, reason: JobError) -> None:
        """Has the job leave before the next iteration."""
        job.stop = job.stop or reason
        self._wake.set()

    async def run(self) -> None:
        """The loop; ends when it is cancelled."""
        loop = asyncio.get_running_loop()
        delivering: asyncio.Task[list[_Delivery]] | None = None
        while True:
            self._leave()
            starting = self._admit()
            if not (self._active or starting):
                self._wake.clear()
                if not self.busy:
                    self.metrics.record("ardiff_frames_per_second", 0.0, model=self.name)
                    await self._wake.wait()
                continue
            began = time.monotonic()
            finished, error = await loop.run_in_executor(self._stepper, self._step, starting)
            for work in self._active.values():
                record = work.job.record
                work.job.record = replace(record, iterations_done=min(work.iterations, record.iterations))
            if delivering is not None:
                self._conclude(await delivering)
            delivering = asyncio.ensure_future(self._send(finished)) if finished else None
            if delivering is not None and (error is not None or not self.engine.busy):
                self._conclude(await delivering)
                delivering = None
            if error is not None:
                self._split(error)
                continue
            self.metrics.record("ardiff_iterations", 1, model=self.name)
            self.metrics.record("ardiff_iteration_seconds", time.monotonic() - began, model=self.name)

    def close(self) -> None:
        """Gives the threads back."""
        self._stepper.shutdown(wait=False)
        self._deliverer.shutdown(wait=False)

    def _admit(self) -> list[Job]:
        # Jobs of a failed iteration are tried again among themselves, group by group, before others join.
        if self._suspects:
            source, count = self._suspects, 0 if self._active else self._together
        else:
            source, count = self._waiting, self.config.engine.max_requests - len(self._active)
        chosen = [source.popleft() for _ in range(min(count, len(source)))]
        for job in chosen:
            if job.deadline is None:
                job.deadline = time.monotonic() + self.config.job_seconds
                job.record = replace(job.record, status="in_progress", started_at=time.time())
        return chosen

    def _leave(self) -> None:
        """Jobs that were stopped, or are past their deadline, leave now."""
        now = time.monotonic()
        late = JobError("deadline", f"The video was not ready after {self.config.job_seconds:g} s: ask for less.")
        for job in [*self._waiting, *self._suspects, *(work.job for work in self._active.values())]:
            if job.deadline is not None and now > job.deadline:
                job.stop = job.stop or late
        for queue in (self._waiting, self._suspects):
            for job in [job for job in queue if job.stop]:
                queue.remove(job)
                self._ended(job, job.stop, None)
        for request_id, work in list(self._active.items()):
            if work.job.stop:
                self._remove(request_id)
                self._ended(work.job, work.job.stop, None)

    def _ended(self, job: Job, failure: JobError | None, digest: str | None) -> None:
        self.here -= 1
        self._alone = self._alone and job.record.deaths == 0
        self._tell(job, failure, digest)

    def _remove(self, request_id: int) -> None:
        self._active.pop(request_id)
        self.engine.cancel(request_id)

    def _step(self, starting: list[Job]) -> "tuple[list[_Finished], Exception | None]":
        """In its thread: takes jobs in, makes an iteration; returns what has frames to send, and how it failed."""
        fresh: list[_Finished] = []
        for job in starting:
            try:
                job.work = job.work or _Work(job, self.pipeline, self.config)
                request_id = self.engine.submit(job.work.begin())
            except Exception as error:
                self._blame(job, error)
                continue
            self._active[request_id] = job.work
            fresh.append((job.work, None))
        before = self.engine.frame_evaluations
        try:
            finished = self.engine.step()
        except Exception as error:
            return fresh, error
        self.metrics.record("ardiff_frame_evaluations", self.engine.frame_evaluations - before, model=self.name)
        for request_id in self.engine.running & self._active.keys():
            self._active[request_id].iterations += 1
        return fresh + [(self._active[f.request_id], f) for f in finished], None

    def _blame(self, job: Job, error: Exception) -> None:
        logger.error("Job %s failed.", job.record.id, exc_info=error)
        job.stop = _explain(error)
        self._waiting.append(job)  # from where it leaves with the next iteration

    def _split(self, error: Exception) -> None:
        """An iteration failed and left the engine in the middle of it: a new engine, and half of the jobs at once."""
        for request_id in self._active:
            self.engine.cancel(request_id)  # its memory is needed
        works, self._active = list(self._active.values()), {}
        self.engine = self.pipeline.engine(self.config.engine)
        error.__traceback__ = None  # whose frames hold on to memory
        if self.pipeline.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(works) == 1:
            self._blame(works[0].job, error)
            return
        logger.warning("An iteration of %d jobs failed (%r): trying again in smaller groups.", len(works), error)
        self._together = max(1, len(works) // 2)
        for work in reversed(works):
            work.restart()
            self._suspects.appendleft(work.job)

    def _deliver(self, finished: "list[_Finished]") -> "list[_Delivery]":
        """In its thread: frames of an iteration as video."""
        made = []
        for work, frames in finished:
            if work.job.stop is None:
                try:
                    made.append(work.deliver(frames))
                except Exception as error:
                    logger.error("Job %s failed.", work.job.record.id, exc_info=error)
                    work.job.stop = _explain(error)
        return made

    async def _send(self, finished: "list[_Finished]") -> "list[_Delivery]":
        """Has frames made video and tells readers and records at once, while the next iteration runs."""
        made = await asyncio.get_running_loop().run_in_executor(self._deliverer, self._deliver, finished)
        now = time.time()
        for delivery in made:
            job, work = delivery.work.job, delivery.work
            if job.stop is not None:
                continue
            first = job.record.first_frame_at
            if first is None and delivery.frames:
                first = now
                self.metrics.record("ardiff_first_frame_seconds", now - job.record.created_at, model=self.name)
            job.record = replace(job.record, media_type=work.media_type, frames_done=work.frames, first_frame_at=first)
            if delivery.data:
                job.log.add(delivery.data)
            self._count(delivery.frames)
        return made

    def _conclude(self, made: "list[_Delivery]") -> None:
        """Between two iterations: jobs whose last frame is sent leave."""
        for delivery in made:
            job, work = delivery.work.job, delivery.work
            if delivery.done and job.stop is None:
                job.record = replace(job.record, iterations_done=job.record.iterations)
                self._active = {i: other for i, other in self._active.items() if other is not work}
                self._ended(job, None, work.digest.hexdigest())

    def _count(self, frames: int) -> None:
        now = time.monotonic()
        self._sent.append((now, frames))
        while self._sent[0][0] < now - 10:
            self._sent.popleft()
        self.metrics.record("ardiff_frames", frames, model=self.name)
        self.metrics.record("ardiff_frames_per_second", sum(n for _, n in self._sent) / 10, model=self.name)


@dataclass(frozen=True, slots=True)
class _Delivery:
    """New bytes of a job's video."""

    work: "_Work"
    data: bytes
    frames: int
    done: bool


class _Work:
    """What belongs to a running job: decoder memory, encoder, how far it is."""

    def __init__(self, job: Job, pipeline: ARDiffusionPipeline, config: ServiceConfig) -> None:
        self.job, self.pipeline, self.config = job, pipeline, config
        side, fps = pipeline.vae.config.resolution, job.record.settings["fps"]
        self.writer = FragmentWriter(side, side, fps, config.codec, config.crf)
        self.head: bytes | None = self.writer.start()
        self.media_type = self.writer.media_type
        self.digest = hashlib.sha256()
        self.frames, self.bytes = 0, 0
        self.condition: torch.Tensor | None = None
        if job.given is not None:
            with torch.inference_mode():
                given = torch.from_numpy(job.given)
                self.condition = pipeline.encode_condition(given, None, 1)
        self.restart()

    def restart(self) -> None:
        """Back to the beginning, where the engine lost its place; frames that were sent are not sent again."""
        self.iterations, self.decoded = 0, 0
        self.cache = DecoderCache()

    def begin(self) -> SampleRequest:
        """The request for the engine."""
        return sample_request(self.job.record.settings, self.condition)

    def deliver(self, finished: FinishedFrames | None) -> _Delivery:
        """Encodes finished frames; None is the start, with the given frames, if any."""
        before, done = self.frames, finished is not None and finished.done
        latents = self.condition if finished is None else finished.latents
        data = b"" if latents is None else self._encode(latents)
        if done:
            data += self.writer.finish()
        if data and self.head is not None:  # not earlier: what fails before the first frame has a status of its own
            data, self.head = self.head + data, None
        self.bytes += len(data)
        if self.bytes > self.config.limits.video_bytes:
            raise JobError("too_large", f"The video is larger than {self.config.limits.video_bytes} bytes.")
        return _Delivery(self, data, self.frames - before, done)

    @torch.inference_mode()
    def _encode(self, latents: torch.Tensor) -> bytes:
        if not torch.isfinite(latents).all():
            raise JobError("not_finite", "The model made values that are not finite: try a smaller guidance_scale.")
        data = b""
        for frame in self.pipeline.decode(latents, self.cache):
            self.decoded += 1
            if self.decoded > self.frames:
                picture = frame[0].numpy()
                self.digest.update(picture.tobytes())
                data += self.writer.add(picture)
                self.frames += 1
        return data


_Finished = tuple[_Work, FinishedFrames | None]


def _explain(error: Exception) -> JobError:
    """What a client is told; the rest is in the log."""
    if isinstance(error, JobError):
        return error
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return JobError("out_of_memory", "There was not enough memory for this video: ask for fewer frames.")
    return JobError("internal", "The video could not be generated; the operator's log says why.")
