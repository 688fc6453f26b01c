"""ray_jobs.training without a cluster: samples of each rank, storing checkpoints, resuming, failures."""

import contextlib
import json
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray.train
import torch

from ardiff.data import storage
from ardiff.data.config import ClipConfig
from ardiff.data.encode import encode_video
from ardiff.data.manifest import VideoRecord, manifest_table
from ardiff.data.streams import ClipStream, LatentStream
from ardiff.errors import CheckpointError, ConfigError, DataError, TrainingError
from ardiff.resolution import Resolution
from ardiff.train import shards
from ardiff.train.checkpoint import TrainState, load_checkpoint
from ardiff.train.config import OptimizerConfig, TrainConfig
from ardiff.train.engines.torch_engine import TorchEngine
from ardiff.train.shards import ShardReader
from ray_jobs.runtime import crash_guard, error_log, placement
from ray_jobs.training import trainer
from ray_jobs.training.attempts import TrainingProgress
from ray_jobs.training.batches import load_chunk, rows_of_rank
from ray_jobs.training.callbacks import LoggingCallback, new_attempt_id
from ray_jobs.training.checkpoints import CheckpointCallback
from ray_jobs.training.job import TrainJob
from ray_jobs.training.resume import checkpoint_to_resume, delete_stale_checkpoints, prepare_resume
from ray_jobs.training.trainer import check_cluster_size, explain_failure, raise_on_sigint
from ray_jobs.training.worker import add_sample_names

STREAM = LatentStream([f"file-{i}" for i in range(5)], [7, 9, 4, 8, 5], (4, 2, 4), seed=3, files_per_chunk=2)


@pytest.mark.parametrize("num_workers", [1, 2, 4])
@pytest.mark.parametrize("position", [0, 24])
def test_workers_share_every_batch_in_the_order_of_the_stream(num_workers: int, position: int) -> None:
    config = TrainConfig(batch_size=8, num_workers=num_workers, num_steps=20)
    chunks = range(STREAM.locate(position)[0], STREAM.locate(159)[0] + 1)
    shares = [
        [
            STREAM.start(chunk) + int(row)
            for chunk in chunks
            for row in rows_of_rank(STREAM, chunk, position, 160, config.micro_batches(rank, num_workers)[0], 8)
        ]
        for rank in range(num_workers)
    ]
    size = 8 // num_workers
    for step in range(position // 8, 20):
        place = step - position // 8
        batch = [number for share in shares for number in share[place * size : (place + 1) * size]]
        assert batch == list(range(step * 8, step * 8 + 8))


def test_chunks_follow_each_other() -> None:
    for position in (0, 1, 32, 33, 500):
        chunk, place = STREAM.locate(position)
        assert STREAM.start(chunk) + place == position


def test_errors_name_the_samples() -> None:
    names = [STREAM.names(chunk) for chunk in range(2)]
    assert names[0][0].startswith("file-")
    error = add_sample_names(TrainingError("The loss is nan at step 1 on worker 0, samples 2 to 4: see."), STREAM)
    assert str(error) == f"The loss is nan at step 1 on worker 0, samples 2 to 4 ({', '.join(names[0][2:5])}): see."
    many = str(add_sample_names(TrainingError("samples 0 to 99"), STREAM))
    assert many.endswith(", ...)")


class FakeProgress:
    """Replaces the progress actor."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.log = SimpleNamespace(remote=self.lines.append)
        self.set = self.begin_attempt = SimpleNamespace(remote=lambda *arguments: None)


@pytest.fixture
def callback(tmp_path: Path, make_dit: Any, monkeypatch: pytest.MonkeyPatch) -> CheckpointCallback:
    """A callback whose ``reports`` are what Ray Train was told."""
    reports: list[Any] = []
    monkeypatch.setattr(ray.train, "report", lambda metrics, **rest: reports.append((metrics, rest)))
    job = TrainJob(
        name="test",
        folder=str(tmp_path / "run"),
        fingerprint="key",
        config=TrainConfig(save_patience=2, checkpoint_every=1),
        stream=STREAM,
        make_task=lambda: None,  # type: ignore[arg-type, return-value]
        record=lambda: None,
        description={"kind": "none"},
        result="",
    )
    engine, progress = TorchEngine(make_dit(), OptimizerConfig(), torch.device("cpu")), FakeProgress()
    log = LoggingCallback(job, 0, "0", progress)
    callback = CheckpointCallback(job, engine, None, new_attempt_id(engine.device), progress, log.prepare_flush)
    callback.reports = reports  # type: ignore[attr-defined]
    return callback


def save(callback: Any, step: int, loss: float) -> None:
    callback.on_step_end(step, loss)
    callback.on_checkpoint(TrainState(step, step * 16, "key"))
    callback.on_end()


def test_a_few_checkpoints_may_not_be_stored(callback: Any, make_dit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    save(callback, 1, 3.0)
    good = Path(callback.reports[0][1]["checkpoint"].path)
    upload = storage.upload_folder

    def fail(local: Path, uri: str) -> None:
        if "checkpoint" in uri:
            upload(local, uri)  # half of it gets there
            (Path(uri) / "model-0-of-1.safetensors").write_bytes(b"half")
            raise DataError("Cannot write: No space left on device.")
        upload(local, uri)

    monkeypatch.setattr(storage, "upload_folder", fail)
    save(callback, 2, 2.0)
    save(callback, 3, 2.0)
    assert len(callback.reports) == 1
    assert ["2 could not be stored (1 of 2" in line for line in callback.progress.lines] == [True, False]
    with pytest.raises(TrainingError, match=r"step 4 could not be stored, 3 in a row: .* No space left"):
        save(callback, 4, 2.0)
    assert [p.name for p in good.parent.iterdir()] == [good.name]  # the half-written ones are gone
    engine = TorchEngine(make_dit(seed=4), OptimizerConfig(), torch.device("cpu"))
    assert load_checkpoint(good, engine, "key").step == 1

    monkeypatch.setattr(storage, "upload_folder", upload)
    save(callback, 5, 2.0)
    assert callback.failed_saves == 0
    assert [metrics["step"] for metrics, _ in callback.reports] == [1, 5]


def test_a_full_local_disk_is_such_a_failure(callback: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(shards, "save_file", fail)
    save(callback, 1, 3.0)
    assert not callback.reports
    assert "No space left on device" in callback.progress.lines[-1]


def test_the_best_checkpoint_is_copied(callback: Any) -> None:
    for step, loss in enumerate([3.0, 1.0, 2.0, 1.5], start=1):
        save(callback, step, loss)
    folder = Path(callback.job.folder) / "best"
    best = json.loads((folder / "best.json").read_text())
    assert (best["step"], best["loss"]) == (2, 1.0)
    assert [p.name for p in folder.iterdir() if p.is_dir()] == [best["checkpoint"]]
    assert (folder / best["checkpoint"] / "state.json").exists()
    assert [metrics["loss"] for metrics, _ in callback.reports] == [3.0, 1.0, 2.0, 1.5]
    again = CheckpointCallback(callback.job, callback.engine, None, "2", callback.progress, callback.prepare_flush)
    save(again, 5, 1.2)
    assert json.loads((folder / "best.json").read_text()) == best


def test_only_whole_intervals_compete_for_the_best_checkpoint(callback: Any) -> None:
    """A preemption at step 5, between the checkpoints of steps 4 and 8; the last step is 10."""
    callback.job = replace(callback.job, config=TrainConfig(checkpoint_every=4, num_steps=10))
    file, best = Path(callback.job.best_file), {}
    for step, loss in enumerate([3.0, 3.0, 3.0, 3.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0], start=1):
        callback.on_step_end(step, loss)
        if step in (4, 5, 8, 10):
            callback.on_checkpoint(TrainState(step, step * 16, "key"))
            callback.on_end()
            best[step] = json.loads(file.read_text())["step"]
    assert best == {4: 4, 5: 4, 8: 4, 10: 10}
    assert [metrics["step"] for metrics, _ in callback.reports] == [4, 5, 8, 10]


def test_a_checkpoint_counts_although_its_copy_as_the_best_fails(
    callback: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = storage.upload_folder

    def fail(local: Path, uri: str) -> None:
        if "/best/" in uri:
            raise DataError("Cannot write: No space left on device.")
        upload(local, uri)

    monkeypatch.setattr(storage, "upload_folder", fail)
    save(callback, 1, 3.0)
    assert [metrics["step"] for metrics, _ in callback.reports] == [1]
    assert callback.failed_saves == 0
    assert re.search(r"step 1 is the best one, but .* No space left", callback.progress.lines[-1])


def test_an_old_best_checkpoint_that_cannot_be_deleted_does_no_harm(
    callback: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(uri: str) -> None:
        raise DataError(f"Cannot delete {uri}.")

    save(callback, 1, 3.0)
    monkeypatch.setattr(storage, "delete_folder", fail)
    save(callback, 2, 2.0)
    save(callback, 3, 2.5)
    assert json.loads(Path(callback.job.best_file).read_text())["step"] == 2
    assert not callback.progress.lines


@pytest.fixture
def held_writes(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Tensors are not written before the event."""
    write, event = shards.save_file, threading.Event()

    def wait_and_write(tensors: dict[str, torch.Tensor], file: Path) -> None:
        assert event.wait(60)
        write(tensors, file)

    monkeypatch.setattr(shards, "save_file", wait_and_write)
    yield event
    event.set()


def fail_uploads(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(local: Path, uri: str) -> None:
        raise error

    monkeypatch.setattr(storage, "upload_folder", fail)


def step_until(callback: Any, condition: Callable[[], bool]) -> None:
    """Steps of training in which only the flags travel, until ``condition`` holds."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        callback.on_flags(callback.flags())


def test_training_goes_on_while_a_checkpoint_is_stored(callback: Any, held_writes: threading.Event) -> None:
    [(name, parameter)] = list(callback.engine.model.named_parameters())[:1]
    before = parameter.detach().clone()
    callback.on_step_end(1, 3.0)
    callback.on_checkpoint(TrainState(1, 16, "key"))
    with torch.no_grad():
        parameter.add_(1.0)  # the next update: the checkpoint has its own copy
    callback.on_flags(callback.flags())
    assert callback.flags() == [0.0, 0.0]
    assert not callback.reports
    held_writes.set()
    step_until(callback, lambda: bool(callback.reports))
    [(metrics, rest)] = callback.reports
    assert metrics == {"step": 1, "loss": 3.0}
    assert torch.equal(ShardReader(Path(rest["checkpoint"].path)).read("model", name), before)
    step_until(callback, lambda: callback.under_way is None)  # the copy as the best one
    best = json.loads(Path(callback.job.best_file).read_text())
    assert torch.equal(ShardReader(Path(callback.job.best) / best["checkpoint"]).read("model", name), before)


def test_at_most_one_checkpoint_is_under_way(callback: Any, held_writes: threading.Event) -> None:
    callback.on_step_end(1, 3.0)
    callback.on_checkpoint(TrainState(1, 16, "key"))
    with ThreadPoolExecutor(1) as pool:
        callback.on_step_end(2, 2.0)
        second = pool.submit(callback.on_checkpoint, TrainState(2, 32, "key"))
        assert not wait([second], timeout=0.2).done
        held_writes.set()
        second.result(60)
    assert [metrics["step"] for metrics, _ in callback.reports] == [1]
    callback.on_end()
    assert [metrics["step"] for metrics, _ in callback.reports] == [1, 2]


def test_a_failed_upload_is_found_in_a_later_step(callback: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_uploads(monkeypatch, DataError("Cannot write: No space left on device."))
    callback.on_step_end(1, 3.0)
    callback.on_checkpoint(TrainState(1, 16, "key"))
    step_until(callback, lambda: callback.failed_saves == 1)
    assert not callback.reports
    assert "the checkpoint of step 1 could not be stored (1 of 2 allowed failures)" in callback.progress.lines[-1]


def test_other_errors_of_the_thread_stop_training(callback: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_uploads(monkeypatch, RuntimeError("a defect"))
    callback.on_step_end(1, 3.0)
    callback.on_checkpoint(TrainState(1, 16, "key"))
    with pytest.raises(RuntimeError, match="a defect"):
        step_until(callback, lambda: False)


def test_without_async_checkpoints_training_waits(callback: Any) -> None:
    callback.job = replace(callback.job, config=replace(callback.job.config, async_checkpoints=False))
    callback.on_step_end(1, 3.0)
    callback.on_checkpoint(TrainState(1, 16, "key"))
    assert [metrics["step"] for metrics, _ in callback.reports] == [1]
    assert callback.under_way is None
    assert Path(callback.job.best_file).exists()


def test_checkpoints_on_no_list_are_deleted_at_the_start(callback: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 5):
        save(callback, step, 1.0)
    stored = [Path(rest["checkpoint"].path) for _, rest in callback.reports]
    (stored[3] / "state.json").unlink()
    snapshot = register(Path(callback.job.folder), [stored[1].name])
    best = Path(callback.job.folder) / "best"
    (best / "step-00000009-1").mkdir()
    (best / "step-00000009-1" / "state.json").write_text("{}")
    at = SimpleNamespace(path=str(stored[1]))
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: at)
    job = replace(callback.job, resume=str(stored[2]))

    delete_stale_checkpoints(job)
    assert [place.exists() for place in stored] == [False, True, True, False]
    assert [place.name[:13] for place in best.iterdir() if place.is_dir()] == ["step-00000001"]
    delete_stale_checkpoints(callback.job)
    assert [place.exists() for place in stored] == [False, True, False, False]
    save(callback, 5, 1.0)
    snapshot.write_text("{")  # nothing is known: nothing is deleted
    delete_stale_checkpoints(callback.job)
    assert Path(callback.reports[-1][1]["checkpoint"].path).exists()


def test_a_failure_of_ray_train_itself_is_explained(callback: Any) -> None:
    failure = ray.train.ControllerError(OSError("No space left on device"))
    message = str(explain_failure(failure, callback.job, ""))
    assert "no worker failed: OSError: No space left on device. Check that" in message
    assert callback.job.checkpoints in message
    lost = ray.train.WorkerGroupError("", {})
    assert "3 times: a worker process died without an error" in str(explain_failure(lost, callback.job, ""))


def test_attempts_that_fail_in_the_same_way_stop_training() -> None:
    progress = TrainingProgress()
    progress.end_attempt("lost")
    progress.end_attempt("lost")
    progress.end_attempt("lost")
    assert progress.failure() is None
    for step in (5, 6, 6):
        progress.report_failure("worker 1", f"at step {step}: ValueError: no")
        progress.report_failure("worker 0", "at step 7: RuntimeError: the other one is gone")
        assert progress.last_failure() == f"worker 1 at step {step}: ValueError: no"
        progress.end_attempt("lost")
    assert progress.failure() is None
    progress.report_failure("worker 0", "at step 6: ValueError: no")  # the third time, whoever it was first
    progress.end_attempt("lost")
    assert re.search(r"3 times in the same way.*: worker 0 at step 6: ValueError: no\.", str(progress.failure()))
    assert progress.last_failure() == "worker 0 at step 6: ValueError: no"
    lines = progress.read()[2]
    assert [line.removeprefix("An attempt failed: ")[:8] for line in lines] == ["lost"] * 3 + ["worker 1"] * 3 + [
        "worker 0"
    ]
    progress.end_attempt("lost")
    assert progress.last_failure() == ""


def test_preemptions_are_no_failed_attempts() -> None:
    progress = TrainingProgress()
    for _ in range(4):
        progress.begin_attempt()
        progress.report_preemption("worker 1 received SIGTERM")
        progress.report_preemption("worker 1 received SIGTERM")  # every worker reports it
        progress.end_attempt("lost")
        progress.end_attempt("lost")  # Ray Train may report it more than once
    assert progress.failure() is None
    assert progress.read()[2] == ["Preemption: worker 1 received SIGTERM"] * 4
    progress.begin_attempt()
    progress.end_attempt("lost")
    assert progress.read()[2] == ["An attempt failed: lost"]


@pytest.mark.parametrize(
    ("changes", "device", "message"),
    [
        ({"num_workers": 4}, "cpu", r"train\.num_workers=4 needs 9 CPUs \(train\.cpu_threads=2 each.* has 8"),
        ({"num_workers": 8, "min_workers": 4, "cpu_threads": 3}, "cpu", r"train\.min_workers=4 needs 13 CPUs"),
        ({"num_workers": 4, "cpu_threads": 1}, "cuda", r"train\.num_workers=4 needs 4 GPUs, but .* has 2"),
        ({"num_workers": 2, "cpu_threads": 4}, "cuda", r"needs 9 CPUs"),
        ({"num_workers": 2, "cpu_threads": 3}, "cuda", ""),
        ({"num_workers": 8, "min_workers": 2}, "cpu", ""),
    ],
)
def test_more_workers_than_the_cluster_holds_are_an_error(
    changes: dict[str, Any], device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "await_resource", lambda kind, count: {"CPU": 8, "GPU": 2}[kind])
    with pytest.raises(ConfigError, match=message) if message else contextlib.nullcontext():
        check_cluster_size(TrainConfig(batch_size=8, **changes), torch.device(device))


def test_where_to_start(callback: Any, tmp_path: Path) -> None:
    save(callback, 1, 3.0)
    job, run = callback.job, Path(callback.job.folder)
    stored = callback.reports[0][1]["checkpoint"].path
    assert prepare_resume(job).resume == stored  # it is on no list of Ray Train's
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        prepare_resume(replace(job, folder=str(tmp_path / "other"), resume="latest"))
    with pytest.raises(CheckpointError, match="neither auto, latest, none"):
        prepare_resume(replace(job, resume=str(tmp_path / "nothing")))
    prepare_resume(replace(job, resume=stored))
    register(run, [Path(stored).name])
    latest = replace(job, resume="latest")
    assert prepare_resume(latest) is latest
    prepare_resume(replace(job, resume="none"))
    assert not (run / "ray").exists()
    assert not (run / "best").exists()
    assert not (run / "history.json").exists()


def test_only_a_checkpoint_of_another_run_may_have_other_hyperparameters(
    callback: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    save(callback, 1, 3.0)
    own, best = callback.reports[0][1]["checkpoint"].path, "runs/other/best/step-00000001"
    for resume, expected in ((own, (Path(own), False)), (best, (Path(best), True)), ("auto", (None, False))):
        with checkpoint_to_resume(replace(callback.job, resume=resume)) as found:
            assert found == expected


def register(run: Path, names: list[str]) -> Path:
    """Writes the list of checkpoints as Ray Train does."""
    snapshot = run / "ray" / "checkpoint_manager_snapshot.json"
    snapshot.write_text(json.dumps({"checkpoint_results": [{"checkpoint_dir_name": name} for name in names]}))
    return snapshot


@pytest.mark.parametrize("damage", ["torn", "a folder is gone", "a folder is incomplete"])
def test_a_damaged_list_of_checkpoints_is_renamed(callback: Any, damage: str) -> None:
    save(callback, 1, 3.0)
    save(callback, 2, 2.0)
    run = Path(callback.job.folder)
    first, second = (Path(rest["checkpoint"].path) for _, rest in callback.reports)
    snapshot = register(run, [first.name, second.name])
    match damage:
        case "torn":
            snapshot.write_text(snapshot.read_text()[:30])
        case "a folder is gone":
            shutil.rmtree(second)
        case _:
            (second / "state.json").unlink()
    job = prepare_resume(replace(callback.job, resume="latest"))
    assert job.resume == str(second if damage == "torn" else first)
    assert not snapshot.exists()
    assert snapshot.with_suffix(".json.damaged").exists()


def test_rows_of_a_chunk_equal_those_of_the_whole_chunk(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from ardiff.data.latents import latent_table

    generator = np.random.default_rng(0)
    for file, rows in zip(STREAM.files, STREAM.rows, strict=True):
        columns = {"latents": generator.normal(size=(rows, 4, 2, 4)), "label": np.arange(rows)}
        pq.write_table(latent_table(columns), tmp_path / file)
    stream = LatentStream([str(tmp_path / f) for f in STREAM.files], STREAM.rows, (4, 2, 4), 3, 2)
    rows = np.array([1, 4, 5])
    whole, part = stream.load(1), stream.load(1, rows)
    assert all(np.array_equal(part[name], whole[name][rows]) for name in whole)
    labels = [int(name.rpartition(" ")[2]) for name in stream.names(1)]
    assert labels == whole["label"].tolist()


def test_a_chunk_that_crashes_processes_is_loaded_clip_by_clip_and_the_video_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = TrainingProgress()
    handle = SimpleNamespace(
        begin_input=SimpleNamespace(remote=progress.begin_input), end_input=SimpleNamespace(remote=progress.end_input)
    )
    monkeypatch.setattr(crash_guard.ray, "get", lambda value: value)
    records = []
    for i in range(4):
        place = tmp_path / f"{i}.mp4"
        place.write_bytes(encode_video(np.full((4, 16, 16, 3), 60 * i, np.uint8), 8))
        records.append(VideoRecord(str(place), 9, "h264", 16, 16, 8.0, 4, i, "x", "train", "ok", ""))
    stream = ClipStream(manifest_table(records), ClipConfig(num_frames=2), Resolution.square(16), seed=0, chunk_size=4)
    rows, whole = np.array([0, 2, 3]), stream.load(0, np.array([0, 2, 3]))
    deadly = int(whole["label"][1])
    read = ClipStream._read

    class Death(BaseException):
        """Stands for the end of the process."""

    def reading(self: ClipStream, record: VideoRecord, *rest: Any) -> Any:
        if record.label == deadly:
            raise Death
        return read(self, record, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(ClipStream, "_read", reading)
        for _ in range(4):
            with pytest.raises(Death):
                load_chunk(stream, 0, rows, handle, "chunk 0")
        with pytest.raises(DataError, match=rf"{deadly}\.mp4 crashes the process that reads it"):
            load_chunk(stream, 0, rows, handle, "chunk 0")
    progress.begin_attempt()  # with the attempt that ended, its loading tasks ended
    assert progress.unfinished == {}
    again = load_chunk(stream, 0, rows[[0, 2]], handle, "chunk 0")
    assert all(np.array_equal(values, whole[name][[0, 2]]) for name, values in again.items())
    assert load_chunk(stream, 0, rows, None, "chunk 0")["label"].tolist() == whole["label"].tolist()


def test_ctrl_c_is_an_interruption_during_and_after_training() -> None:
    before = signal.getsignal(signal.SIGINT)
    with raise_on_sigint():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as Ray Train leaves one of its own
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt), raise_on_sigint():
        sys.exit(0)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_error_log_actor_runs_on_the_drivers_node(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    flush = SimpleNamespace(remote=lambda ended: (0, ""))
    handle = SimpleNamespace(remote=lambda *arguments: SimpleNamespace(flush=flush))
    remote = SimpleNamespace(options=lambda **options: asked.update(options) or handle)
    context = SimpleNamespace(get_node_id=lambda: "a" * 56)
    fake = SimpleNamespace(remote=lambda kind: remote, get=lambda value: value, get_runtime_context=lambda: context)
    monkeypatch.setattr(error_log, "ray", fake)
    monkeypatch.setattr(placement, "ray", fake)
    with error_log.error_log("folder", 8, 0.1, "video"):
        strategy = asked["scheduling_strategy"]
    assert (strategy.node_id, strategy.soft) == ("a" * 56, False)
