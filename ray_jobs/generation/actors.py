"""Makes rows of videos with actors on Ray Data: what `generate`, `sweep` and the quickstart share.

Rows that are complete are left alone. An actor that dies is replaced and its rows go on; what a driver left undone is
done by the next one. Several jobs can work on the same rows: each begins at another place and looks before each pack at
what has been made meanwhile, so they do little twice, and what they do twice comes out the same.
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
from ardiff.pretrained import local_folder
from ardiff.sampling.config import EngineConfig
from ardiff.sweep.models import fingerprint_of
from ardiff.sweep.packs import Tries, in_order, make_pack, make_rows, pack_rows
from ardiff.sweep.rows import Record, VideoRow, in_parallel, read_complete, read_record
from ray_jobs.generation.queue import VideoQueue
from ray_jobs.runtime.cluster import await_resource, resolve_device
from ray_jobs.runtime.progress import remote_progress, report_errors


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """What videos are made with."""

    device: str
    """``auto``, ``cpu`` or ``cuda``."""
    batch_size: int
    """Videos made together by one actor."""
    min_actors: int
    max_actors: int
    cpu_threads: int
    """Threads of an actor, and CPUs that it reserves."""
    gpus: float
    """GPUs that an actor reserves, where there are any."""
    engine: EngineConfig
    attempts: int
    """How often a video is tried alone before it is given up."""


def make_videos(
    rows: Sequence[VideoRow], complete: dict[str, Record], workers: Workers, what: str, refused: int = 0
) -> dict[str, Record]:
    """Makes every row whose record place is not in ``complete``. Returns the records of all rows by that place.

    Args:
        rows: Of any cells.
        complete: Records of rows that are there.
        workers: What to make them with.
        what: Name of the progress bar.
        refused: Videos beside ``rows`` that cannot be made, which progress counts as failed.

    Raises:
        ArdiffError: There are not the CPUs or GPUs for the actors, a checkpoint changed, or storage failed for good.
    """
    missing = [row for row in rows if row.record not in complete]
    if not missing:
        return dict(complete)
    device = resolve_device(workers.device)
    _check_room(workers, device)
    packs = [[asdict(row) for row in pack] for pack in in_order(pack_rows(missing, workers.batch_size))]
    actors = min(workers.max_actors, len(packs))
    context = ray.data.DataContext.get_current().copy()
    # A task takes packs until there are none left, so one is all that an actor is given, and then the pool is busy.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    frames = sum(row.num_frames for row in missing)
    records = dict(complete)
    counts = (len(rows) + refused, len(rows) - len(missing), refused)
    with (
        ray.data.DataContext.current(context),
        remote_progress(what, frames, "frame", VideoQueue, *counts, packs) as progress,
    ):
        # Items, since a range is read by tasks, which would wait for CPUs that the actors have.
        done = ray.data.from_items([{"task": n} for n in range(actors)], override_num_blocks=actors).flat_map(
            _Maker,
            fn_constructor_args=(workers, device.type, progress),
            compute=ray.data.ActorPoolStrategy(
                min_size=min(workers.min_actors, actors), max_size=actors, max_tasks_in_flight_per_actor=1
            ),
            num_gpus=workers.gpus if device.type == "cuda" else 0,
            num_cpus=workers.cpu_threads,
        )
        for line in done.iter_rows():
            records[line["place"]] = Record(**json.loads(line["record"]))
    return records


def _check_room(workers: Workers, device: torch.device) -> None:
    """Raises ConfigError where the actors to begin with would wait for what is not there for ever."""
    kind: Literal["CPU", "GPU"] = "GPU" if device.type == "cuda" else "CPU"
    each = workers.gpus if kind == "GPU" else workers.cpu_threads
    have = await_resource(kind, math.ceil(workers.min_actors * each))
    if workers.min_actors * each > have:
        raise ConfigError(
            f"{workers.min_actors} actors of {each:g} {kind}s each are more than the {have} of the Ray cluster: "
            "lower min_actors or what each takes."
        )


class _Maker:
    """An actor that holds a pipeline and makes pack after pack, as the queue deals them.

    A task that is repeated, since its actor died, is dealt the same packs again: of those that had ended it reads the
    records, of the one in work it makes what is missing.
    """

    def __init__(self, workers: Workers, device: str, progress: Any) -> None:
        torch.set_num_threads(workers.cpu_threads)
        self.workers, self.device, self.progress, self.told = workers, device, progress, 0.0
        self.loaded: tuple[str, str] | None = None
        self.pipeline: ARDiffusionPipeline | None = None

    def __call__(self, task: dict[str, Any]) -> Iterator[dict[str, Any]]:
        turn = 0
        while (dealt := ray.get(self.progress.deal.remote(int(task["task"]), turn))) is not None:
            number, pack, ended = dealt
            rows = [VideoRow(**row) for row in pack]
            with report_errors(self.progress):
                records = in_parallel(read_record, rows) if ended else [None]
                made = list(self._make(number, rows) if None in records else zip(rows, records, strict=True))
            self.progress.end.remote(number)
            yield from ({"place": row.record, "record": json.dumps(asdict(record))} for row, record in made)
            turn += 1

    def _make(self, number: int, rows: list[VideoRow]) -> Iterator[tuple[VideoRow, Record]]:
        """Each row with its record."""
        meanwhile: list[tuple[VideoRow, Record | None]] = list(zip(rows, in_parallel(read_complete, rows), strict=True))
        for row, record in meanwhile:
            if record is not None:
                yield self._tell(number, row, record)
        left = {row.id: row for row, record in meanwhile if record is None}
        if not left:
            return
        tried = ray.get(self.progress.tried.remote([row.record for row in left.values()]))
        for record in make_rows(
            list(left.values()),
            lambda pack, tries: make_pack(
                self._pipeline(rows[0]), pack, tries, lambda frames: self._advance(number, frames)
            ),
            lambda pack: ray.get(self.progress.begin.remote(number, [row.record for row in pack])),
            {i: Tries(*tried[row.record]) for i, row in left.items() if row.record in tried},
            self.workers.attempts,
        ):
            yield self._tell(number, left[record.id], record)

    def _advance(self, number: int, frames: int) -> None:
        if time.monotonic() - self.told > 0.25:
            self.told = time.monotonic()
            self.progress.advance.remote(number, frames)

    def _tell(self, number: int, row: VideoRow, record: Record) -> tuple[VideoRow, Record]:
        self.progress.finish.remote(number, row.record, record.status == "ok", row.num_frames)
        return row, record

    def _pipeline(self, row: VideoRow) -> ARDiffusionPipeline:
        """The row's pipeline; the last one is kept. Raises CheckpointError if it is not the one that the row names."""
        name = (row.weights, row.precision)
        if self.loaded != name:
            self.pipeline = None  # before there are two of them in memory
            with local_folder(row.checkpoint) as folder:
                if fingerprint_of(str(folder)) != row.weights:
                    raise CheckpointError(f"{row.checkpoint} has changed since the job began: start the job again.")
                dtype = torch.bfloat16 if row.precision == "bf16" else torch.float32
                engine = self.workers.engine
                self.pipeline = ARDiffusionPipeline.from_pretrained(str(folder), self.device, dtype, engine)
            self.loaded = name
        assert self.pipeline is not None
        return self.pipeline
