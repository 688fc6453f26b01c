"""Decides whether a request is accepted: its values, its upload, the limits of its key, and the capacity."""

import asyncio
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Literal

import numpy as np

from ardiff.errors import DataError
from ardiff.sampling.cost import sequential_passes
from ardiff.sampling.engine import EngineLimitError
from ardiff.sampling.params import FROM_INPUT, InvalidParamError, ModelInfo, SamplingParams
from ardiff.serving.async_store import AsyncStore
from ardiff.serving.completion import JobFinisher
from ardiff.serving.config import RequestLimits, ServiceConfig
from ardiff.serving.errors import RequestError, invalid, overloaded
from ardiff.serving.jobs import Job, RunningJobs
from ardiff.serving.keys import ApiKeys, RateLimiter
from ardiff.serving.model_runner import ModelRunner
from ardiff.serving.queue import JobQueue
from ardiff.serving.records import JobRecord, new_id
from ardiff.serving.schemas import RequestBase, maximum_values
from ardiff.serving.shutdown import Shutdown
from ardiff.serving.uploads import decode_upload

MAX_DECODERS, MAX_WAITING_UPLOADS = 2, 8
"""Uploads that are decoded at the same time, and those that wait for it with their bytes in memory."""


class Admission:
    """Accepts requests as jobs. Each method raises RequestError 4xx or 503, and then nothing was accepted."""

    def __init__(
        self,
        models: Mapping[str, ModelRunner],
        keys: ApiKeys,
        storage: AsyncStore,
        queue: JobQueue,
        running: RunningJobs,
        finisher: JobFinisher,
        config: ServiceConfig,
        shutdown: Shutdown,
    ) -> None:
        self._models, self._keys, self._storage, self._queue = models, keys, storage, queue
        self._running, self._finisher, self._config, self._shutdown = running, finisher, config, shutdown
        self._rates = RateLimiter()
        self._uploads = UploadDecoder(config.limits)
        self._lock = asyncio.Lock()
        """Held from the check of the capacity until the job counts."""

    async def queue_job(self, owner: str, request: RequestBase, upload: bytes | None) -> JobRecord:
        """Puts a job into the queue of all replicas."""
        record, given_frames = await self._prepare(owner, request, upload, "job")
        async with self._lock:
            await self._create(record, given_frames)
            self._queue.waiting += 1
        self._queue.notify()
        return record

    async def start_stream(self, owner: str, request: RequestBase, upload: bytes | None) -> Job:
        """Starts a job on this replica now."""
        record, given_frames = await self._prepare(owner, request, upload, "stream")
        async with self._lock:
            await self._create(record, given_frames)
            job = self._models[record.model].start(record, given_frames)
            self._running.add(job)
        return job

    async def _prepare(
        self, owner: str, request: RequestBase, upload: bytes | None, kind: Literal["job", "stream"]
    ) -> tuple[JobRecord, np.ndarray | None]:
        """The record of a valid request, and its given frames, uint8 ``(k, H, W, 3)``."""
        if self._shutdown.started:
            raise overloaded("This replica is stopping: try again.", 1)
        if wait := self._rates.wait(owner, self._keys.limits_of(owner).requests_per_minute):
            raise RequestError(429, "rate_limit", "Too many requests per minute: wait.", retry_after=wait)
        model = self._model(request.model)
        params = resolve(request, model, self._config)  # before the expensive decoding of the upload
        record = JobRecord(
            id=new_id(),
            owner=owner,
            kind=kind,
            model=model.name,
            params=asdict(params),
            fps=self._config.fps if request.fps is None else request.fps,
            size=model.size,
            iterations=sequential_passes(params),
            created_at=time.time(),
            lease=int(kind == "stream"),
        )
        if upload is None:
            return record, None
        await self._check_capacity(record)  # before the expensive decoding, too
        given_frames = await self._uploads.decode(upload, model.info.resolution)
        params = _check(replace(params, given_frames=len(given_frames)), model)
        return replace(record, params=asdict(params), iterations=sequential_passes(params)), given_frames

    async def _create(self, record: JobRecord, given_frames: np.ndarray | None) -> None:
        await self._check_capacity(record)
        try:
            await self._storage.call_timed(self._storage.store.create, record, given_frames)
        except RequestError:
            self._finisher.withdraw(record)
            raise

    async def _check_capacity(self, record: JobRecord) -> None:
        """Raises RequestError if the queue is full, the owner has too many jobs, or a stream cannot start now.

        The last free slot is kept for a queued job: streams do not wait, so they could take every slot before it.
        """
        self._storage.check_responsive()
        open_jobs = await self._storage.call_timed(self._storage.store.open_jobs)
        leases = await self._storage.call_timed(self._storage.store.leases)
        if list(open_jobs.values()).count(record.owner) >= self._keys.limits_of(record.owner).jobs:
            raise RequestError(429, "too_many_jobs", "Too many unfinished videos: wait for one.", retry_after=5)
        waiting = self._queue.waiting = sum(job_id not in leases for job_id in open_jobs)
        starting = sum(job.record.status == "queued" for job in self._running)
        if waiting + starting >= self._config.max_waiting + self._queue.free_slots:
            raise overloaded(f"{waiting} videos are queued already: try again later.", 5)
        free_slots = self._models[record.model].free_slots
        if record.kind == "stream" and (self._queue.waits_for_idle or free_slots <= bool(waiting)):
            raise overloaded("No slot is free now: try again, or request a job, which waits for one.", 2)

    def _model(self, name: str | None) -> ModelRunner:
        if name is None:
            return next(iter(self._models.values()))
        if name not in self._models:
            raise invalid("model", f"There is no model '{name[:64]}': choose one of {', '.join(self._models)}.")
        return self._models[name]


def resolve(request: RequestBase, model: ModelRunner, config: ServiceConfig) -> SamplingParams:
    """The complete sampling parameters of a request, checked against the service's limits and the model.

    Raises:
        RequestError: 422 with the invalid field, before anything is computed.
    """
    values = request.model_dump()
    for name, maximum in maximum_values(config.limits).items():
        if values[name] is not None and values[name] > maximum:
            raise invalid(name, f"{name} is {values[name]}: at most {maximum} is allowed.")
    if request.size not in (None, model.size):
        raise invalid("size", f"size is {str(request.size)[:32]}: the model '{model.name}' makes {model.size} only.")
    values["class_label"] = _class_index(request.class_label, model.info)
    values["seed"] = secrets.randbelow(2**31) if request.seed is None else request.seed
    names = [f.name for f in fields(SamplingParams) if f.name in values]
    return _check(SamplingParams.from_dict({name: values[name] for name in names}), model)


def _check(params: SamplingParams, model: ModelRunner) -> SamplingParams:
    try:
        return model.check(params)
    except InvalidParamError as error:
        param = "input_reference" if error.param in FROM_INPUT else error.param
        raise invalid(param, f"{str(error).removesuffix('.')}.") from error
    except EngineLimitError as error:
        raise invalid(None, str(error)) from error


def _class_index(label: int | str | None, model: ModelInfo) -> int | None:
    if not isinstance(label, str):
        return label
    if label in model.class_names:
        return model.class_names.index(label)
    if label.isdecimal() and len(label) < 10:
        return int(label)
    raise invalid("class_label", f"There is no class '{label[:64]}': the model {model.valid_classes}.")


class UploadDecoder:
    """Decodes uploads, a few at the same time."""

    def __init__(self, limits: RequestLimits) -> None:
        self._limits = limits
        self._slots, self._pending = asyncio.Semaphore(MAX_DECODERS), 0

    async def decode(self, upload: bytes, resolution: int) -> np.ndarray:
        """The frames of an upload, uint8 ``(k, R, R, 3)``. Raises RequestError 422, or 503 if too many wait."""
        limits = self._limits
        if self._pending >= MAX_DECODERS + MAX_WAITING_UPLOADS:
            raise overloaded("Too many uploads are being decoded: try again.", 2)
        self._pending += 1
        try:
            async with self._slots:
                return await decode_upload(
                    upload,
                    resolution,
                    limits.upload_frames,
                    limits.upload_pixels,
                    limits.upload_seconds,
                    limits.upload_memory_bytes,
                )
        except DataError as error:
            raise invalid("input_reference", str(error)) from error
        finally:
            self._pending -= 1
