"""From which checkpoint a run starts, and which checkpoints are deleted.

Ray Train keeps a list of a run's latest checkpoints, its snapshot file, and resumes from the last one. The list can be
damaged if the run is killed while Ray Train writes it; then the newest complete checkpoint is used.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import ray.train
from rich.markup import escape

from ardiff.data import storage
from ardiff.errors import CheckpointError, DataError
from ardiff.train.checkpoint import STATE
from ray_jobs.runtime.console import print_line
from ray_jobs.training.job import TrainJob

SNAPSHOT, RESULTS = "checkpoint_manager_snapshot.json", "checkpoint_results"
"""Ray Train's list of a run's checkpoints, and the key of the list in that file."""


def prepare_resume(job: TrainJob) -> TrainJob:
    """Applies ``job.resume`` to the run's folder. Returns the job with the checkpoint to start from.

    If Ray Train's list is empty or damaged, this is the newest complete checkpoint.

    Raises:
        CheckpointError: ``resume`` is no checkpoint, or it is ``latest`` and there is none.
    """
    if job.resume == "none":
        for name in ("ray", "best", "tensorboard"):
            storage.delete_folder(storage.join(job.folder, name))
        storage.delete_file(job.history_file)
        return job
    if job.resume not in ("auto", "latest") and not storage.exists(storage.join(job.resume, STATE)):
        raise CheckpointError(f"resume={job.resume} is neither auto, latest, none nor the folder of a checkpoint.")
    try:
        if registered_checkpoints(job.checkpoints):
            return job
    except CheckpointError as error:
        snapshot = storage.join(job.checkpoints, SNAPSHOT)
        storage.write_bytes(f"{snapshot}.damaged", storage.read_bytes(snapshot))
        storage.delete_file(snapshot)
        print_line(f"[yellow]{escape(str(error))}[/] It was renamed to {SNAPSHOT}.damaged.")
    folders = _checkpoint_folders(job.checkpoints)
    if complete := [name for name in folders if storage.exists(storage.join(job.checkpoints, name, STATE))]:
        print_line(f"{job.name}: starting from the newest complete checkpoint, {complete[-1]}")
        return replace(job, resume=storage.join(job.checkpoints, complete[-1]))
    if job.resume == "latest":
        raise CheckpointError(f"There is no checkpoint in {job.folder} to resume from: resume=auto starts a new run.")
    return job


def registered_checkpoints(folder: str) -> list[str]:
    """The names on Ray Train's list of the checkpoints in ``folder``; empty if there is no list.

    Raises CheckpointError if the list is damaged or names a checkpoint that is not complete, which Ray Train cannot
    handle.
    """
    snapshot = storage.join(folder, SNAPSHOT)
    if not storage.exists(snapshot):
        return []
    try:
        names = [str(result["checkpoint_dir_name"]) for result in json.loads(storage.read_bytes(snapshot))[RESULTS]]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"Ray Train's list of checkpoints, {snapshot}, is damaged.") from error
    for name in names:
        if not storage.exists(storage.join(folder, name, STATE)):
            raise CheckpointError(f"Ray Train's list of checkpoints, {snapshot}, names {name}, which is not complete.")
    return names


@contextlib.contextmanager
def checkpoint_to_resume(job: TrainJob) -> Iterator[tuple[Path | None, bool]]:
    """A local copy of the checkpoint to start from, or None; and whether it is of another run, named by the user.

    The run's own last checkpoint has precedence over the one that the configuration names.
    """
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            yield Path(folder), False
    elif job.resume in ("auto", "latest", "none"):
        yield None, False
    else:
        of_other_run = not job.resume.startswith(f"{job.checkpoints}/")
        if storage.is_remote(job.resume):
            with tempfile.TemporaryDirectory() as copy:
                storage.download_folder(job.resume, Path(copy))
                yield Path(copy), of_other_run
        else:
            yield Path(job.resume), of_other_run


def delete_stale_checkpoints(job: TrainJob) -> None:
    """Deletes checkpoints of earlier attempts that are on no list. Does nothing if storage or the list fails."""
    with contextlib.suppress(CheckpointError, DataError):
        keep = {*registered_checkpoints(job.checkpoints), job.resume.rstrip("/").rpartition("/")[2]}
        if (checkpoint := ray.train.get_checkpoint()) is not None:
            keep.add(checkpoint.path.rstrip("/").rpartition("/")[2])
        if storage.exists(job.best_file):
            keep.add(json.loads(storage.read_bytes(job.best_file))["checkpoint"])
        for folder in (job.checkpoints, job.best):
            for name in set(_checkpoint_folders(folder)) - keep:
                storage.delete_folder(storage.join(folder, name))


def _checkpoint_folders(folder: str) -> list[str]:
    """The names of all checkpoint folders in ``folder``, complete or not, sorted by step."""
    files = storage.list_files(folder) if storage.exists(folder) else []
    names = [file[len(folder.rstrip("/")) + 1 :].partition("/") for file in files]
    return sorted({name for name, below, _ in names if below and name.startswith(("checkpoint-", "step-"))})
