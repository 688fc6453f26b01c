"""The loop of one model: jobs enter and leave the sampling engine between its iterations.

Two threads: one runs the engine's iterations; the other decodes and encodes what the previous iteration finished. An
error fails one job. If an iteration fails, its jobs are repeated in smaller groups until the one that fails is alone.
"""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ardiff.config import fingerprint
from ardiff.errors import ArdiffError, ConfigError
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.sampling.engine import EngineLimitError, PlannedChange
from ardiff.sampling.params import InvalidParamError, SamplingMode, SamplingParams, validate
from ardiff.sampling.request import FinishedFrames, SampleRequest
from ardiff.sampling.saved import SavedState
from ardiff.serving.config import ServiceConfig
from ardiff.serving.encoding import Fragment, JobEncoder
from ardiff.serving.errors import JobError, RequestError
from ardiff.serving.jobs import Job
from ardiff.serving.metrics import Recorder
from ardiff.serving.records import JobRecord
from ardiff.serving.store import Segment

logger = logging.getLogger(__name__)
RATE_SECONDS = 10
"""Seconds over which ``ardiff_frames_per_second`` is measured."""
OnEnded = Callable[[Job, JobError | None, str | None], None]
Publish = Callable[[Job], Awaitable[bool]]
Finished = tuple[JobEncoder, FinishedFrames | None, SavedState | None]


class ModelRunner:
    """Runs the jobs of one model."""

    def __init__(
        self,
        name: str,
        pipeline: ARDiffusionPipeline,
        config: ServiceConfig,
        metrics: Recorder,
        publish: Publish,
        on_ended: OnEnded,
    ) -> None:
        """
        Args:
            publish: Writes the record of a job and returns whether its lease is held. Raises RequestError.
            on_ended: Called as ``on_ended(job, failure, frames_sha256)`` when a job has left the engine.

        Raises:
            ConfigError: The engine cannot sample this model, or its text encoder is missing or another one.
        """
        self.info = pipeline.info
        if reason := self.info.mode_error("window", 1):
            raise ConfigError(f"The model {name} cannot be served: {reason}.")
        self.name, self.pipeline, self.config, self.metrics = name, pipeline, config, metrics
        if self.info.text:
            try:
                pipeline.text.load(pipeline.device)
            except ArdiffError as error:
                raise ConfigError(
                    f"The model {name} cannot be served: {error} Its config.json names it as text_encoder.uri."
                ) from error
        self.engine = pipeline.engine(config.engine)
        self.fingerprint = _fingerprint(pipeline)
        self.num_jobs = 0
        """Jobs of this runner, waiting ones included."""
        self._reserved = 0
        self._publish, self._on_ended = publish, on_ended
        self._runs_alone = False
        self._waiting: deque[JobEncoder] = deque()
        self._active: dict[int, JobEncoder] = {}
        """Jobs in the engine, by its request identifier."""
        self._retries: deque[JobEncoder] = deque()
        """Jobs of a failed iteration, which start again in groups of ``_group_size``."""
        self._group_size = 1
        self._wake = asyncio.Event()
        self._frames_sent: deque[tuple[float, int]] = deque()
        self._engine_thread = ThreadPoolExecutor(1, f"engine of {name}")
        self._encoder_thread = ThreadPoolExecutor(1, f"encoder of {name}")

    @property
    def modes(self) -> list[SamplingMode]:
        """Sampling modes that the engine offers for this model."""
        return [mode for mode in self.info.modes if mode != "full"]

    @property
    def busy(self) -> bool:
        """Whether the runner has any job."""
        return self.num_jobs > 0

    @property
    def free_slots(self) -> int:
        """Jobs that could start now. A job with which a replica crashed before runs alone."""
        return 0 if self._runs_alone else max(0, self.config.engine.max_requests - self.num_jobs - self._reserved)

    @contextlib.contextmanager
    def reserve_slot(self) -> Iterator[None]:
        """Keeps a slot for a stream that is about to start."""
        self._reserved += 1
        try:
            yield
        finally:
            self._reserved -= 1

    def check(self, params: SamplingParams) -> SamplingParams:
        """Returns the parameters with ``ar_step`` filled in.

        Raises:
            InvalidParamError: The model cannot sample them.
            EngineLimitError: They are beyond the engine's limits.
        """
        params = validate(params, self.info)  # unlike the engine, it knows the names of the classes
        shape = (1, params.given_frames, self.pipeline.dit.config.num_tokens, self.pipeline.dit.config.token_dim)
        condition = torch.empty(shape, device="meta") if params.given_frames else None
        prompts = self.pipeline.text.placeholders(params)
        return self.engine.check(SampleRequest(videos=(params,), condition=condition, prompts=prompts)).params

    async def check_texts(self, params: SamplingParams) -> None:
        """Raises InvalidParamError if a text is too long for the text encoder and ``engine.long_prompts`` is error."""
        long_prompts = self.config.engine.long_prompts
        if params.texts and long_prompts == "error":
            text = self.pipeline.text  # its lock is held while another thread encodes
            await asyncio.to_thread(text.check, params.texts, self.pipeline.device, long_prompts)

    def start(self, record: JobRecord, given_frames: np.ndarray | None, published: Sequence[Segment] = ()) -> Job:
        """Takes a job, which enters the engine at the next iteration with capacity for it, and continues what another
        replica has published of it."""
        job = Job(record, given_frames, self._wake, published)
        self.num_jobs += 1
        self._runs_alone = self._runs_alone or record.crashes > 0
        self._waiting.append(JobEncoder(job, self.pipeline, self.config, self.fingerprint))
        self._wake.set()
        return job

    async def run(self) -> None:
        """The loop. It runs until it is cancelled."""
        loop = asyncio.get_running_loop()
        sending: asyncio.Task[list[Fragment]] | None = None
        while True:
            self._end_stopped()
            starting = self._next_jobs()
            if not (self._active or starting):
                self._wake.clear()
                if not self.busy:
                    self.metrics.record("ardiff_frames_per_second", 0.0, model=self.name)
                    await self._wake.wait()
                continue
            began = time.monotonic()
            begun = await loop.run_in_executor(self._engine_thread, self._submit, starting) if starting else []
            await self._apply_changes()
            finished, error = await loop.run_in_executor(self._engine_thread, self._iterate)
            finished = begun + finished
            for encoder in self._active.values():
                record = encoder.job.record
                encoder.job.record = replace(record, iterations_done=max(encoder.iterations, record.iterations_done))
            if sending is not None:
                self._end_completed(await sending)
            sending = asyncio.ensure_future(self._send(finished)) if finished else None
            if sending is not None and (error is not None or not self.engine.busy):
                self._end_completed(await sending)
                sending = None
            if error is not None:
                self._recover(error)
                continue
            self.metrics.record("ardiff_iterations", 1, model=self.name)
            self.metrics.record("ardiff_iteration_seconds", time.monotonic() - began, model=self.name)

    def close(self) -> None:
        """Stops the threads."""
        self._engine_thread.shutdown(wait=False)
        self._encoder_thread.shutdown(wait=False)

    def _next_jobs(self) -> list[JobEncoder]:
        """Jobs that enter the engine now. Those of a failed iteration run group by group before others enter."""
        if self._retries:
            source, count = self._retries, 0 if self._active else self._group_size
        elif self._waiting and self._waiting[0].job.record.crashes:
            source, count = self._waiting, 0 if self._active else 1
        else:
            source, count = self._waiting, self.config.engine.max_requests - len(self._active)
        chosen = [source.popleft() for _ in range(min(count, len(source)))]
        for encoder in chosen:
            job = encoder.job
            if job.deadline is None:
                job.deadline = time.monotonic() + self.config.job_seconds
                job.record = replace(job.record, status="in_progress", started_at=time.time())
        return chosen

    def _end_stopped(self) -> None:
        """Ends jobs that were stopped or are past their deadline."""
        now = time.monotonic()
        expired = JobError(
            "deadline", f"The video was not ready after {self.config.job_seconds:g} s: request fewer frames or steps."
        )
        for encoder in [*self._waiting, *self._retries, *self._active.values()]:
            if encoder.job.deadline is not None and now > encoder.job.deadline:
                encoder.job.stop(expired)
        for queue in (self._waiting, self._retries):
            for encoder in [encoder for encoder in queue if encoder.job.stop_reason]:
                queue.remove(encoder)
                self._end(encoder.job, encoder.job.stop_reason, None)
        for request_id, encoder in list(self._active.items()):
            if encoder.job.stop_reason:
                self._active.pop(request_id)
                self.engine.cancel(request_id)
                self._end(encoder.job, encoder.job.stop_reason, None)

    def _end(self, job: Job, failure: JobError | None, frames_sha256: str | None) -> None:
        self.num_jobs -= 1
        self._runs_alone = self._runs_alone and job.record.crashes == 0
        self._on_ended(job, failure, frames_sha256)

    async def _apply_changes(self) -> None:
        """Applies the changes that clients have requested of the jobs in the engine."""
        for request_id, encoder in self._active.items():
            job = encoder.job
            while job.changes_due and job.stop_reason is None and (values := job.record.next_change) is not None:
                try:
                    job.changes_due = await self._apply_change(request_id, job, values)
                except (EngineLimitError, RequestError) as error:
                    logger.warning("A change of %s waits: %s", job.record.id, error)
                    job.changes_due = False  # until the next look at the queue
                except Exception as error:
                    logger.error("Job %s failed.", job.record.id, exc_info=error)
                    job.stop_reason = _client_error(error)

    async def _apply_change(self, request_id: int, job: Job, values: dict[str, Any]) -> bool:
        """Applies the next change of a job between two iterations, after it is stored with its frame: a replica that
        continues the job applies it at the same one. Returns False if the lease is lost."""
        loop, before = asyncio.get_running_loop(), job.record
        planned = await loop.run_in_executor(self._engine_thread, self._plan, request_id, values)
        job.record = job.record.with_change(None if planned is None else planned.frame)
        held = False
        try:
            held = await self._publish(job)
        finally:
            if not held:
                job.record = replace(job.record, params=before.params, change_frames=before.change_frames)
        if held and planned is not None:
            await loop.run_in_executor(self._engine_thread, planned.apply)
        return held

    def _plan(self, request_id: int, values: dict[str, Any]) -> PlannedChange | None:
        """In the engine thread: a change of a request; None if it is too late for it."""
        texts = [values["prompt"]] if values.get("prompt") else []
        prompts = self.pipeline.text.encode(texts, self.pipeline.device, self.config.engine.long_prompts)
        try:
            return self.engine.plan_change(request_id, values, prompts)
        except InvalidParamError as error:  # it would turn off guidance, which another change had turned on
            logger.warning("A change was not applied: %s", error)
            return None

    def _submit(self, starting: list[JobEncoder]) -> list[Finished]:
        """In the engine thread: gives jobs to the engine. Returns those that it takes, without finished frames."""
        begun: list[Finished] = []
        for encoder in starting:
            try:
                request_id = self.engine.submit(encoder.start(self.engine.check))
            except Exception as error:
                self._fail(encoder, error)
                continue
            self._active[request_id] = encoder
            begun.append((encoder, None, None))
        return begun

    def _iterate(self) -> tuple[list[Finished], Exception | None]:
        """In the engine thread: runs one iteration. Returns finished frames, and its error if any."""
        before, finished = self.engine.frame_evaluations, list[Finished]()
        try:
            events = self.engine.step()
        except Exception as error:
            return finished, error
        self.metrics.record("ardiff_frame_evaluations", self.engine.frame_evaluations - before, model=self.name)
        for request_id, iterations in self.engine.iterations.items():
            self._active[request_id].iterations = iterations
        for frames in events:
            state = None if frames.done else self.engine.save(frames.request_id)
            finished.append((self._active[frames.request_id], frames, state))
        return finished, None

    def _fail(self, encoder: JobEncoder, error: Exception) -> None:
        """Has a job that is not in the engine end with the next iteration."""
        logger.error("Job %s failed.", encoder.job.record.id, exc_info=error)
        encoder.job.stop_reason = _client_error(error)
        self._waiting.append(encoder)

    def _recover(self, error: Exception) -> None:
        """After a failed iteration: makes a new engine and repeats the jobs in groups of half the size."""
        for request_id in self._active:
            self.engine.cancel(request_id)  # frees its memory
        encoders, self._active = list(self._active.values()), {}
        self.engine = self.pipeline.engine(self.config.engine)
        error.__traceback__ = None  # its frames keep memory alive
        if self.pipeline.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(encoders) == 1:
            self._fail(encoders[0], error)
            return
        logger.warning("An iteration of %d jobs failed (%r): repeating them in smaller groups.", len(encoders), error)
        self._group_size = max(1, len(encoders) // 2)
        self._retries.extendleft(reversed(encoders))

    async def _send(self, finished: list[Finished]) -> list[Fragment]:
        """Encodes finished frames and passes them to readers and records, while the next iteration runs."""
        fragments = await asyncio.get_running_loop().run_in_executor(self._encoder_thread, self._encode, finished)
        now = time.time()
        for fragment in fragments:
            encoder, job = fragment.encoder, fragment.encoder.job
            if job.stop_reason is not None:
                continue
            first = job.record.first_frame_at
            if first is None and fragment.num_frames:
                first = now
                self.metrics.record("ardiff_first_frame_seconds", now - job.record.created_at, model=self.name)
            job.record = replace(
                job.record, media_type=encoder.media_type, frames_done=encoder.num_frames, first_frame_at=first
            )
            if fragment.latents is None and not job.log.fragments:
                self._begin(job, encoder)
            if fragment.latents is not None:
                job.latents.append(fragment.latents)
                job.state = encoder.state
            if fragment.data:
                job.log.add(fragment.data)
            self._count(fragment.num_frames)
        return fragments

    def _begin(self, job: Job, encoder: JobEncoder) -> None:
        """Notes where the video began, and adds what another replica has published of it."""
        job.record = replace(
            job.record, begun=encoder.begun, pipeline=self.fingerprint, stream_bytes=len(encoder.replayed)
        )
        if encoder.replayed:
            job.log.add(encoder.replayed)
            job.published_fragments = 1
            logger.info("%s continues after %d frames.", job.record.id, encoder.num_frames)

    def _encode(self, finished: list[Finished]) -> list[Fragment]:
        """In the encoder thread: the fragments of finished frames."""
        fragments = []
        for encoder, frames, state in finished:
            if encoder.job.stop_reason is None:
                try:
                    fragments.append(encoder.encode(frames, state))
                except Exception as error:
                    logger.error("Job %s failed.", encoder.job.record.id, exc_info=error)
                    encoder.job.stop_reason = _client_error(error)
        return fragments

    def _end_completed(self, fragments: list[Fragment]) -> None:
        """Ends jobs whose last frame is sent."""
        for fragment in fragments:
            encoder, job = fragment.encoder, fragment.encoder.job
            if fragment.last and job.stop_reason is None:
                job.record = replace(job.record, iterations_done=job.record.iterations)
                self._active = {key: other for key, other in self._active.items() if other is not encoder}
                self._end(job, None, encoder.frames_sha256)

    def _count(self, num_frames: int) -> None:
        now = time.monotonic()
        self._frames_sent.append((now, num_frames))
        while self._frames_sent[0][0] < now - RATE_SECONDS:
            self._frames_sent.popleft()
        rate = sum(count for _, count in self._frames_sent) / RATE_SECONDS
        self.metrics.record("ardiff_frames", num_frames, model=self.name)
        self.metrics.record("ardiff_frames_per_second", rate, model=self.name)


def _fingerprint(pipeline: ARDiffusionPipeline) -> str:
    """Equal for pipelines with the same configuration and weights."""
    digest = hashlib.sha256()
    for module in (pipeline.vae, pipeline.dit):
        for parameter in module.parameters():
            digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    configs = pipeline.vae.config, pipeline.dit.config, pipeline.diffusion, pipeline.statistics
    return fingerprint(digest.hexdigest(), *configs)


def _client_error(error: Exception) -> JobError:
    """The error that the client receives; the log has the original one."""
    if isinstance(error, JobError):
        return error
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return JobError("out_of_memory", "There was not enough memory for this video: request fewer frames.")
    return JobError("internal", "Generating the video failed. The server log has the reason.")
