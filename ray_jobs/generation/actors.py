"""Generates video specs with Ray Data actors; `generate`, `sweep` and the quickstart share this.

Complete specs are left alone. A worker that crashes is replaced, and its batch goes on. Several jobs can work on the
same specs: each starts with another batch and checks before every batch what has been completed meanwhile, so little is
generated twice, and what is comes out the same.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import ray
import ray.data
import torch

from ardiff.errors import CheckpointError, ConfigError
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.pretrained import fingerprint_of, local_folder
from ardiff.sampling.config import EngineConfig
from ardiff.sweep.batches import Attempts, generate_batch, generate_with_retries, make_batches, schedule_batches
from ardiff.sweep.specs import Record, VideoSpec, in_parallel, read_complete, read_record
from ray_jobs.generation.queue import VideoQueue
from ray_jobs.runtime.cluster import await_resource, resolve_device
from ray_jobs.runtime.progress import remote_progress, report_errors

REPORT_SECONDS = 0.25
"""Time between two reports of a worker's frames."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSettings:
    """The actors that generate videos."""

    device: str
    """``auto``, ``cpu`` or ``cuda``."""
    batch_size: int
    """Videos that one actor generates together."""
    min_actors: int
    max_actors: int
    cpu_threads: int
    """Threads of an actor, and the CPUs that it reserves."""
    gpus: float
    """GPUs that an actor reserves on a GPU cluster."""
    engine: EngineConfig
    attempts: int
    """Attempts at a video alone before it counts as failed."""


def generate_videos(
    specs: Sequence[VideoSpec], complete: dict[str, Record], workers: WorkerSettings, description: str, invalid: int = 0
) -> dict[str, Record]:
    """Generates every spec whose record is not in ``complete``.

    Args:
        specs: Of any sweep points.
        complete: Records of complete specs, by the URI of the record.
        workers: The actors.
        description: Title of the progress bar.
        invalid: Further videos that cannot be generated; progress counts them as failed.

    Returns:
        The records of all specs, by the URI of the record.

    Raises:
        ArdiffError: The cluster lacks CPUs or GPUs for the actors, a checkpoint changed, or storage failed for good.
    """
    missing = [spec for spec in specs if spec.record not in complete]
    if not missing:
        return dict(complete)
    device = resolve_device(workers.device)
    _check_resources(workers, device)
    batches = schedule_batches(make_batches(missing, workers.batch_size))
    actors = min(workers.max_actors, len(batches))
    context = ray.data.DataContext.get_current().copy()
    # A task takes batches until none is left, so an actor has one task only. With one task per actor the pool is busy.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    frames = sum(spec.sampling.num_frames for spec in missing)
    counts = (len(specs) + invalid, len(specs) - len(missing), invalid)
    queue_arguments = (*counts, [[asdict(spec) for spec in batch] for batch in batches])
    records = dict(complete)
    with (
        ray.data.DataContext.current(context),
        remote_progress(description, frames, "frame", VideoQueue, *queue_arguments) as queue,
    ):
        # from_items, because range is read by tasks, which would wait for CPUs that the actors hold.
        tasks = ray.data.from_items([{"task": n} for n in range(actors)], override_num_blocks=actors)
        results = tasks.flat_map(
            GenerationWorker,
            fn_constructor_args=(workers, device.type, queue),
            compute=ray.data.ActorPoolStrategy(
                min_size=min(workers.min_actors, actors), max_size=actors, max_tasks_in_flight_per_actor=1
            ),
            num_gpus=workers.gpus if device.type == "cuda" else 0,
            num_cpus=workers.cpu_threads,
        )
        for row in results.iter_rows():
            records[row["uri"]] = Record(**json.loads(row["record"]))
    return records


def _check_resources(workers: WorkerSettings, device: torch.device) -> None:
    """Raises ConfigError if the cluster can never start ``min_actors`` actors, which would wait forever."""
    kind: Literal["CPU", "GPU"] = "GPU" if device.type == "cuda" else "CPU"
    each = workers.gpus if kind == "GPU" else workers.cpu_threads
    available = await_resource(kind, math.ceil(workers.min_actors * each))
    if workers.min_actors * each > available:
        raise ConfigError(
            f"{workers.min_actors} actors of {each:g} {kind}s each are more than the {available} of the Ray cluster: "
            f"lower min_actors or the {kind}s per actor."
        )


class GenerationWorker:
    """An actor that holds a pipeline and generates the batches that the queue deals.

    A task that is repeated after a crash is dealt the same batches again. It reads the records of those that had ended,
    and generates what is missing of the one that was running.
    """

    def __init__(self, workers: WorkerSettings, device: str, queue: Any) -> None:
        torch.set_num_threads(workers.cpu_threads)
        self.workers, self.device, self.queue, self.last_report = workers, device, queue, 0.0
        self.loaded: tuple[str, str] | None = None
        self.pipeline: ARDiffusionPipeline | None = None

    def __call__(self, task: dict[str, Any]) -> Iterator[dict[str, Any]]:
        turn = 0
        while (dealt := ray.get(self.queue.deal.remote(int(task["task"]), turn))) is not None:
            batch, values, ended = dealt
            specs = [VideoSpec.from_dict(value) for value in values]
            with report_errors(self.queue):
                records = [r for r in in_parallel(read_record, specs) if r is not None] if ended else []
                complete = len(records) == len(specs)
                results = list(zip(specs, records, strict=True) if complete else self._generate(batch, specs))
            self.queue.end.remote(batch)
            yield from ({"uri": spec.record, "record": json.dumps(asdict(record))} for spec, record in results)
            turn += 1

    def _generate(self, batch: int, specs: list[VideoSpec]) -> Iterator[tuple[VideoSpec, Record]]:
        """Each spec with its record; generates those that no job has completed."""
        missing: dict[str, VideoSpec] = {}
        for spec, record in zip(specs, in_parallel(read_complete, specs), strict=True):
            if record is None:
                missing[spec.id] = spec
            else:
                yield self._finish(batch, spec, record)
        if not missing:
            return
        earlier = ray.get(self.queue.get_attempts.remote([spec.record for spec in missing.values()]))

        def generate(part: list[VideoSpec], attempts: list[int]) -> Iterator[Record]:
            pipeline = self._pipeline(specs[0])
            return generate_batch(pipeline, part, attempts, lambda frames: self._advance(batch, frames))

        for record in generate_with_retries(
            list(missing.values()),
            generate,
            lambda part: ray.get(self.queue.begin.remote(batch, [spec.record for spec in part])),
            {i: Attempts(*earlier[spec.record]) for i, spec in missing.items() if spec.record in earlier},
            self.workers.attempts,
        ):
            yield self._finish(batch, missing[record.id], record)

    def _advance(self, batch: int, frames: int) -> None:
        if time.monotonic() - self.last_report > REPORT_SECONDS:
            self.last_report = time.monotonic()
            self.queue.advance.remote(batch, frames)

    def _finish(self, batch: int, spec: VideoSpec, record: Record) -> tuple[VideoSpec, Record]:
        self.queue.finish.remote(batch, spec.record, record.status == "ok", spec.sampling.num_frames)
        return spec, record

    def _pipeline(self, spec: VideoSpec) -> ARDiffusionPipeline:
        """The pipeline of a spec; the last one is cached. Raises CheckpointError if its files have changed."""
        key = (spec.weights, spec.precision)
        if self.pipeline is None or self.loaded != key:
            self.pipeline = None  # frees its memory before the next one is loaded
            with local_folder(spec.checkpoint) as folder:
                if fingerprint_of(str(folder)) != spec.weights:
                    raise CheckpointError(f"{spec.checkpoint} has changed since the job started: start the job again.")
                dtype = torch.bfloat16 if spec.precision == "bf16" else torch.float32
                engine = self.workers.engine
                self.pipeline = ARDiffusionPipeline.from_pretrained(str(folder), self.device, dtype, engine)
            self.loaded = key
        return self.pipeline
