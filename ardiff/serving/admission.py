"""Decides whether a request is accepted: its values, its upload, the limits of its key, and the capacity."""

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, replace
from typing import Literal

import numpy as np

from ardiff.errors import DataError
from ardiff.resolution import Resolution
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
        self._creating: dict[str, JobRecord] = {}
        """Accepted jobs that are not in storage yet."""
        self._listings: list[dict[str, JobRecord]] = []
        """What each check in progress may not see in storage."""

    async def queue_job(
        self,
        owner: str,
        request: RequestBase,
        upload: bytes | None,
        idempotency_key: str | None = None,
        extends: bool = False,
    ) -> JobRecord:
        """Puts a job into the queue of all replicas. A second request with the same key gets the first one's job.

        With ``extends`` the request counts new frames only, which follow those of the upload.
        """
        self._check_acceptance(owner)
        job_id, key_hash = new_id(), None
        if idempotency_key is not None:
            key_hash = hashlib.sha256(idempotency_key.encode()).hexdigest()
            if (earlier := await self._reserve(owner, key_hash, job_id, _hash_request(request, upload))) is not None:
                return earlier
        try:
            record, given_frames = await self._prepare(job_id, owner, request, upload, "job", extends)
            record = replace(record, idempotency=key_hash)
            await self._create(record, given_frames)
        except BaseException:
            if key_hash is not None:
                await self._storage.call(self._storage.store.unreserve, owner, key_hash)
            raise
        self._queue.notify()
        return record

    async def _reserve(self, owner: str, key_hash: str, job_id: str, request_hash: str) -> JobRecord | None:
        """Takes an idempotency key for a job. Returns the job that was requested with it before, if any."""
        store = self._storage.store
        first_id, first_hash = await self._storage.call_timed(store.reserve, owner, key_hash, job_id, request_hash)
        if first_hash != request_hash:
            message = "This Idempotency-Key belongs to another request: use a new key for each video."
            raise invalid("Idempotency-Key", message)
        if first_id == job_id:
            return None
        record = await self._storage.call_timed(store.read, owner, first_id)
        if record is None:
            message = "The first request with this Idempotency-Key is not accepted yet: try again."
            raise RequestError(409, "not_ready", message, retry_after=1)
        return record.now()

    async def start_stream(self, owner: str, request: RequestBase, upload: bytes | None) -> Job:
        """Starts a job on this replica now."""
        self._check_acceptance(owner)
        record, given_frames = await self._prepare(new_id(), owner, request, upload, "stream")
        await self._create(record, given_frames)
        job = self._models[record.model].start(record, given_frames)
        self._running.add(job)
        return job

    def _check_acceptance(self, owner: str) -> None:
        """Raises RequestError if the replica stops, or the owner sends too many requests."""
        if self._shutdown.started:
            raise overloaded("This replica is stopping: try again.", 1)
        if wait := self._rates.wait(owner, self._keys.limits_of(owner).requests_per_minute):
            raise RequestError(429, "rate_limit", "Too many requests per minute: wait.", retry_after=wait)

    async def _prepare(
        self,
        job_id: str,
        owner: str,
        request: RequestBase,
        upload: bytes | None,
        kind: Literal["job", "stream"],
        extends: bool = False,
    ) -> tuple[JobRecord, np.ndarray | None]:
        """The record of a valid request, and its given frames, uint8 ``(k, H, W, 3)``."""
        model = self._model(request.model)
        params = resolve(request, model, self._config)  # before the expensive decoding of the upload
        with _as_request_errors():
            await model.check_texts(params)
        record = JobRecord(
            id=job_id,
            owner=owner,
            kind=kind,
            model=model.name,
            params=asdict(params),
            prompt=request.prompt,
            fps=self._config.fps if request.fps is None else request.fps,
            size=model.info.shape_of(params).size,
            iterations=sequential_passes(params),
            created_at=time.time(),
            lease=int(kind == "stream"),
        )
        if upload is None:
            return record, None
        await self._check_capacity(record, accept=False)  # before the expensive decoding, too
        given_frames = await self._uploads.decode(upload, model.info.shape_of(params))
        params = replace(params, given_frames=len(given_frames))
        if extends:
            params = replace(params, num_frames=params.num_frames + len(given_frames), ar_step=None)
            _check_maximum("num_frames", params.num_frames, self._config.limits.num_frames)
        params = _check(params, model)
        return replace(record, params=asdict(params), iterations=sequential_passes(params)), given_frames

    async def _create(self, record: JobRecord, given_frames: np.ndarray | None) -> None:
        """Stores an accepted job. Others are accepted and stored meanwhile."""
        await self._check_capacity(record, accept=True)
        try:
            await self._storage.call_timed(self._storage.store.create, record, given_frames)
        except RequestError:
            self._finisher.withdraw(record)
            raise
        finally:
            self._creating.pop(record.id, None)

    async def _check_capacity(self, record: JobRecord, accept: bool) -> None:
        """Raises RequestError if the queue is full, the owner has too many jobs, or a stream cannot start now.

        The last free slot is kept for a queued job: streams do not wait, so they could take every slot before it.
        With ``accept`` the job counts from now on.
        """
        self._storage.check_responsive()
        with self._unlisted() as unlisted:
            open_jobs = await self._storage.call_timed(self._storage.store.open_jobs)
            leases = await self._storage.call_timed(self._storage.store.leases)
        created = [other for other in unlisted.values() if other.id not in open_jobs]
        owned = [job.owner for job in open_jobs.values()] + [other.owner for other in created]
        if owned.count(record.owner) >= self._keys.limits_of(record.owner).jobs:
            raise RequestError(429, "too_many_jobs", "Too many unfinished videos: wait for one.", retry_after=5)
        queued = sum(job_id not in leases for job_id in open_jobs) + sum(other.kind == "job" for other in created)
        starting = sum(job.record.status == "queued" for job in self._running)
        streams = [other for other in unlisted.values() if other.kind == "stream" and other.id not in self._running]
        self._queue.waiting = queued
        if queued + starting + len(streams) >= self._config.max_waiting + self._queue.free_slots:
            raise overloaded(f"{queued} videos are queued already: try again later.", 5)
        free_slots = self._models[record.model].free_slots - sum(other.model == record.model for other in streams)
        if record.kind == "stream" and free_slots <= bool(queued):
            raise overloaded("No slot is free now: try again, or request a job, which waits for one.", 2)
        if accept:
            self._creating[record.id] = record
            for listing in self._listings:
                listing[record.id] = record
            self._queue.waiting += record.kind == "job"

    @contextlib.contextmanager
    def _unlisted(self) -> Iterator[dict[str, JobRecord]]:
        """Jobs that are created here before or while storage is listed, which the listing may lack."""
        unlisted = dict(self._creating)
        self._listings.append(unlisted)
        try:
            yield unlisted
        finally:
            self._listings = [other for other in self._listings if other is not unlisted]

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
    if request.seconds is not None:
        if "num_frames" in request.model_fields_set:
            raise invalid("seconds", "Give num_frames or seconds, not both.")
        values["num_frames"] = round(float(request.seconds) * (config.fps if request.fps is None else request.fps))
    for name, maximum in maximum_values(config.limits).items():
        _check_maximum(name, values[name], maximum)
    if request.prompt is not None and not model.info.text:
        if request.class_label is not None:
            raise invalid("prompt", "Give prompt or class_label, not both: for this model both name a class.")
        values |= {"prompt": None, "class_label": _class_index(request.prompt, model.info, "prompt")}
    else:
        values["class_label"] = _class_index(request.class_label, model.info, "class_label")
    values["seed"] = secrets.randbelow(2**31) if request.seed is None else request.seed
    names = [f.name for f in fields(SamplingParams) if f.name in values]
    params = SamplingParams.from_dict({name: values[name] for name in names})
    if (count := len(params.texts)) > config.limits.texts:
        raise invalid("conditions", f"The video has {count} texts: at most {config.limits.texts} are allowed.")
    return _check(params, model)


def _check_maximum(name: str, value: float | None, maximum: float) -> None:
    if value is not None and value > maximum:
        raise invalid(name, f"{name} is {value}: at most {maximum} is allowed.")


def _check(params: SamplingParams, model: ModelRunner) -> SamplingParams:
    with _as_request_errors():
        return model.check(params)


@contextlib.contextmanager
def _as_request_errors() -> Iterator[None]:
    """Turns what the model refuses into RequestError 422."""
    try:
        yield
    except InvalidParamError as error:
        param = "input_reference" if error.param in FROM_INPUT else error.param
        raise invalid(param, f"{str(error).removesuffix('.')}.") from error
    except EngineLimitError as error:
        raise invalid(None, str(error)) from error


def _class_index(label: int | str | None, model: ModelInfo, param: str) -> int | None:
    """The class with this index or name. No name, an empty text, is no class. Raises RequestError 422."""
    if not isinstance(label, str):
        return label
    if not label:
        return None
    if label in model.class_names:
        return model.class_names.index(label)
    if label.isdecimal() and len(label) < 10:
        return int(label)
    reason = f"There is no class '{label[:64]}': the model {model.valid_classes}"
    raise invalid(param, f"{reason}, and takes no text." if param == "prompt" else f"{reason}.")


def _hash_request(request: RequestBase, upload: bytes | None) -> str:
    """Differs for requests that differ."""
    digest = hashlib.sha256(request.model_dump_json(exclude_unset=True).encode())
    digest.update(upload or b"")
    return digest.hexdigest()


class UploadDecoder:
    """Decodes uploads, a few at the same time."""

    def __init__(self, limits: RequestLimits) -> None:
        self._limits = limits
        self._slots, self._pending = asyncio.Semaphore(MAX_DECODERS), 0

    async def decode(self, upload: bytes, resolution: Resolution) -> np.ndarray:
        """The frames of an upload, uint8 ``(k, H, W, 3)``. Raises RequestError 422, or 503 if too many wait."""
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
