"""Decides whether a request is accepted: its values, its upload, the limits of its key, and the capacity."""

import asyncio
import contextlib
import hashlib
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields, replace
from typing import Any, Literal

import numpy as np

from ardiff.errors import DataError
from ardiff.resolution import Resolution
from ardiff.sampling.cost import sequential_passes
from ardiff.sampling.engine import EngineLimitError
from ardiff.sampling.params import FROM_INPUT, FrameCondition, InvalidParamError, ModelInfo, SamplingParams
from ardiff.serving.async_store import Stores
from ardiff.serving.config import RequestLimits, ServiceConfig
from ardiff.serving.errors import RequestError, UnavailableError, invalid, overloaded
from ardiff.serving.jobs import Job, RunningJobs
from ardiff.serving.keys import ApiKeys, RateLimiter
from ardiff.serving.model_runner import ModelRunner
from ardiff.serving.queue import JobQueue
from ardiff.serving.records import JobRecord, new_id
from ardiff.serving.schemas import ConditionBase, RequestBase, maximum_values
from ardiff.serving.shutdown import Shutdown
from ardiff.serving.store import Load
from ardiff.serving.uploads import decode_upload

MAX_DECODERS, MAX_WAITING_UPLOADS = 2, 8
"""Uploads that are decoded at the same time, and those that wait for it with their bytes in memory."""


class Admission:
    """Accepts requests as jobs. Each method raises RequestError 4xx or 503, and then nothing was accepted."""

    def __init__(
        self,
        models: Mapping[str, ModelRunner],
        keys: ApiKeys,
        stores: Stores,
        queue: JobQueue,
        running: RunningJobs,
        config: ServiceConfig,
        shutdown: Shutdown,
    ) -> None:
        self._models, self._keys, self._jobs, self._files = models, keys, stores.jobs, stores.files
        self._queue, self._running, self._config, self._shutdown = queue, running, config, shutdown
        self._rates = RateLimiter()
        self._uploads = UploadDecoder(config)

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
        key: dict[str, Any] = {}
        if idempotency_key is not None:
            key_hash = hashlib.sha256(idempotency_key.encode()).hexdigest()
            key = {"idempotency": key_hash, "request_hash": _hash_request(request, upload)}
            if (earlier := await self._repeated(owner, **key)) is not None:
                return earlier
        record, given_frames = await self._prepare(owner, request, upload, "job", extends)
        record = replace(record, **key)
        if await self._create(record, given_frames, self._capacity_check(record)):
            self._queue.waiting += 1
            self._queue.notify()
            return record
        if (earlier := await self._repeated(owner, **key)) is not None:
            return earlier
        raise RequestError(409, "not_ready", "The first video with this Idempotency-Key was just deleted: try again.")

    async def _repeated(self, owner: str, idempotency: str, request_hash: str) -> JobRecord | None:
        """The job that was requested with an idempotency key before, if any."""
        earlier = await self._jobs.call_timed(self._jobs.store.repeated, owner, idempotency)
        if earlier is not None and earlier.request_hash != request_hash:
            message = "This Idempotency-Key belongs to another request: use a new key for each video."
            raise invalid("Idempotency-Key", message)
        return earlier

    async def start_stream(self, owner: str, request: RequestBase, upload: bytes | None) -> Job:
        """Starts a job on this replica now."""
        self._check_acceptance(owner)
        record, given_frames = await self._prepare(owner, request, upload, "stream")
        runner = self._models[record.model]
        check = self._capacity_check(record)
        with runner.reserve_slot():
            await self._create(record, given_frames, check)
        job = runner.start(record, given_frames)
        self._running.add(job)
        return job

    async def resolve_change(self, record: JobRecord, request: ConditionBase) -> dict[str, Any]:
        """The values of a change of a job, by name, checked like those of a request for a video."""
        model = self._model(record.model)
        values = _resolve_change(request, record.sampling, model, self._config.limits)
        with _as_request_errors():
            await model.check_texts(SamplingParams(prompt=values.get("prompt")))
        return values

    def _check_acceptance(self, owner: str) -> None:
        """Raises RequestError if the replica stops, or the owner sends too many requests."""
        if self._shutdown.started:
            raise overloaded("This replica is stopping: try again.", 1)
        if wait := self._rates.wait(owner, self._keys.limits_of(owner).requests_per_minute):
            raise RequestError(429, "rate_limit", "Too many requests per minute: wait.", retry_after=wait)

    async def _prepare(
        self,
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
            id=new_id(),
            owner=owner,
            kind=kind,
            model=model.name,
            params=asdict(params),
            prompt=request.prompt,
            fps=self._config.fps if request.fps is None else request.fps,
            size=model.info.shape_of(params).size,
            iterations=sequential_passes(params),
            created_at=time.time(),
            status="in_progress" if kind == "stream" else "queued",  # nobody else takes a stream
            lease=int(kind == "stream"),
        )
        if upload is None:
            return record, None
        load = await self._jobs.call_timed(self._jobs.store.load, owner)
        self._capacity_check(record)(load)  # before the expensive decoding, too
        given_frames = await self._uploads.decode(upload, model.info.shape_of(params))
        params = replace(params, given_frames=len(given_frames))
        if extends:
            params = replace(params, num_frames=params.num_frames + len(given_frames), ar_step=None)
            _check_maximum("num_frames", params.num_frames, self._config.limits.num_frames)
        params = _check(params, model)
        return replace(record, params=asdict(params), iterations=sequential_passes(params)), given_frames

    async def _create(self, record: JobRecord, given_frames: np.ndarray | None, check: Callable[[Load], None]) -> bool:
        """Stores a job that passes the check. Returns False if there is one with its idempotency key."""
        self._jobs.check_responsive()
        created = False
        try:
            if given_frames is not None:
                await self._files.call_timed(self._files.store.write_input, record, given_frames)
            deadline = time.monotonic() + self._config.storage_seconds

            def check_in_time(load: Load) -> None:
                if time.monotonic() > deadline:  # the client has received 503 already
                    raise UnavailableError("database")
                check(load)

            created = await self._jobs.call_timed(self._jobs.store.create, record, check_in_time)
        finally:
            if given_frames is not None and not created:
                with contextlib.suppress(RequestError):
                    await self._files.call(self._files.store.delete_input, record)
        return created

    def _capacity_check(self, record: JobRecord) -> Callable[[Load], None]:
        """A check against the jobs in the database: it raises RequestError if the queue is full, the owner has too many
        jobs, or a stream cannot start now.

        The last free slot is kept for a queued job: streams do not wait, so they could take every slot before it.
        """
        max_owned = self._keys.limits_of(record.owner).jobs
        max_queued = self._config.max_waiting + self._queue.free_slots
        needs_slot = record.kind == "stream"  # a job waits for one
        free_slots = self._models[record.model].free_slots if needs_slot else math.inf

        def check(load: Load) -> None:
            if load.owned >= max_owned:
                raise RequestError(429, "too_many_jobs", "Too many unfinished videos: wait for one.", retry_after=5)
            if load.queued >= max_queued:
                raise overloaded(f"{load.queued} videos are queued already: try again later.", 5)
            if free_slots <= bool(load.queued):
                raise overloaded("No slot is free now: try again, or request a job, which waits for one.", 2)

        return check

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
    values |= _condition(request, model.info)
    values["seed"] = secrets.randbelow(2**31) if request.seed is None else request.seed
    names = [f.name for f in fields(SamplingParams) if f.name in values]
    params = SamplingParams.from_dict({name: values[name] for name in names})
    if (count := len(params.texts)) > config.limits.texts:
        raise invalid("conditions", f"The video has {count} texts: at most {config.limits.texts} are allowed.")
    return _check(params, model)


def _resolve_change(
    request: ConditionBase, params: SamplingParams, model: ModelRunner, limits: RequestLimits
) -> dict[str, Any]:
    """The values of a change within a video of these parameters, by name. Raises RequestError 422."""
    requested = request.model_dump() | _condition(request, model.info)
    values = {name: value for name, value in requested.items() if value is not None}
    if not values:
        raise invalid(None, f"Nothing changes: give at least one of {', '.join(requested)}.")
    for name, maximum in maximum_values(limits).items():
        _check_maximum(name, values.get(name), maximum)
    changed = params.with_change(FrameCondition(frame=params.num_frames - 1, **values))
    try:
        _check(changed, model)
    except RequestError as error:
        if error.param != "conditions":  # which is no field of a change
            raise
        raise invalid(next((name for name in values if name in str(error)), None), str(error)) from error
    if changed.guided and not params.guided:
        message = "Guidance is off in this video: request one with another guidance_scale than 1 to change it."
        raise invalid("guidance_scale", message)
    return values


def _condition(request: ConditionBase, model: ModelInfo) -> dict[str, Any]:
    """The prompt and the class index of a request. Raises RequestError 422."""
    if request.prompt is None or model.text:
        return {"prompt": request.prompt, "class_label": _class_index(request.class_label, model, "class_label")}
    if request.class_label is not None:
        raise invalid("prompt", "Give prompt or class_label, not both: for this model both name a class.")
    return {"prompt": None, "class_label": _class_index(request.prompt, model, "prompt")}


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

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        self._slots, self._pending = asyncio.Semaphore(MAX_DECODERS), 0

    async def decode(self, upload: bytes, resolution: Resolution) -> np.ndarray:
        """The frames of an upload, uint8 ``(k, H, W, 3)``. Raises RequestError 422, or 503 if too many wait."""
        limits = self._config.limits
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
                    (self._config.deinterlace, self._config.tone_map),
                )
        except DataError as error:
            raise invalid("input_reference", str(error)) from error
        finally:
            self._pending -= 1
