"""Training on two workers: killed workers, checkpoints on other numbers of workers, export, and errors."""

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from jobs import PATIENCE, Jobs, Result, processes_of
from resuming import (
    assert_equal_checkpoints,
    assert_equal_files,
    last_checkpoint,
    snapshot,
    wait_for_checkpoint,
    wait_for_line,
)
from s3_server import S3Server
from safetensors.torch import load_file

from ardiff.pipeline import ARDiffusionPipeline
from ardiff.train.shards import ShardReader

pytestmark = pytest.mark.ray

Command = Callable[..., Result]
STEPS = 120
SIZES = {"num_frames": 8, "num_tokens": 2, "token_dim": 4, "width": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
TRAIN = ["train.batch_size=8", "train.checkpoint_every=10", "train.log_every=10", "train.cpu_threads=1"]
TRAIN += ["train.loading_tasks=1"]
SETTINGS = [*[f"dit.{name}={value}" for name, value in SIZES.items()], "files_per_chunk=2", *TRAIN]
ENGINES = {
    "torch": ["train.optimizer.name=muon"],
    "fsdp": ["train.engine=fsdp", "train.optimizer.name=muon"],
    **{f"zero{s}": ["train.engine=deepspeed", f"train.deepspeed.stage={s}"] for s in (1, 2, 3)},
}


def settings(latents: Path, engine: str, num_workers: int = 2) -> list[str]:
    counts = [f"train.num_steps={STEPS}", f"train.num_workers={num_workers}"]
    return [f"latents={latents}", *SETTINGS, *ENGINES[engine], *counts]


def train_workers(ray_folder: str) -> list[psutil.Process]:
    """The processes of Ray Train's two workers."""
    workers = []
    for process in processes_of(ray_folder):
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in process.name() + " ".join(process.cmdline()):
                workers.append(process)
    assert len(workers) == 2, workers
    return workers


def kill_a_worker(folder: Path) -> None:
    """Waits for the first checkpoint of the run in ``folder``, then sends SIGKILL to one of its two workers."""
    wait_for_checkpoint(folder)
    train_workers(os.environ["RAY_TMPDIR"])[-1].kill()


def check_killed_worker(ardiff: Command, folder: Path, job: str, settings: list[str], weights: str) -> None:
    """A run that loses a worker ends with the same bits as a run that does not."""
    whole, broken = folder / "whole", folder / "broken"
    ardiff(job, "--output", whole, *settings).expect(0)
    with ThreadPoolExecutor(1) as pool:
        kill = pool.submit(kill_a_worker, broken)
        err = ardiff(job, "--output", broken, *settings).expect(0)
        kill.result()
    assert re.search(r"resuming from the checkpoint of step \d+", err), "the run ended before the worker was killed"
    assert_equal_checkpoints(whole, broken)
    assert_equal_files(whole / weights, broken / weights)


def check_killed_dit_worker(ardiff: Command, latents: Path, folder: Path, engine: str) -> None:
    check_killed_worker(ardiff, folder, "train-dit", settings(latents, engine), "pipeline/dit.safetensors")


@pytest.mark.slow
def test_zero_survives_a_killed_worker_and_its_checkpoint_resumes_on_one_worker(
    ardiff: Command, cluster: None, latents: Path, tmp_path: Path
) -> None:
    check_killed_dit_worker(ardiff, latents, tmp_path, "zero2")
    whole = tmp_path / "whole"
    assert len(list((whole / "ray").glob("checkpoint-*"))) == 2  # the last two; the best is in another folder
    best = json.loads((whole / "best" / "best.json").read_text())
    assert [p.name for p in (whole / "best").iterdir() if p.is_dir()] == [best["checkpoint"]]
    logged = json.loads((whole / "history.json").read_text())
    assert {"samples_per_second", "data_wait_share", "tflops_per_worker", "memory_gib"} <= logged.keys()

    # The last checkpoint but one, on one worker without DeepSpeed, at nearly the same learning rate: the same loss, up
    # to rounding.
    start = min((whole / "ray").glob("checkpoint-*"))
    alone = tmp_path / "alone"
    plain = [s for s in settings(latents, "zero2", 1) if "engine" not in s and "deepspeed" not in s]
    plain += ["train.optimizer.lr=2.00001e-4"]
    err = ardiff("train-dit", "--output", alone, "--resume", start, *plain).expect(0)
    assert f"resuming from the checkpoint of step {STEPS - 10}" in err
    assert "resuming with train.optimizer.lr from 0.0002 to 0.000200001" in err
    history = json.loads((alone / "history.json").read_text())
    assert history["loss"] == [[STEPS, pytest.approx(logged["loss"][-1][1], rel=1e-4)]]
    assert history["lr"] == [[STEPS, 2.00001e-4]]

    # Export without DeepSpeed: the engine's weights.
    for kind, part in (("ema", "ema"), ("raw", "model")):
        end, out = last_checkpoint(whole), tmp_path / kind
        ardiff("export", end, out, "--weights", kind).expect(0)
        shards, exported = ShardReader(end), load_file(out / "dit.safetensors")
        assert all(torch.equal(exported[name], shards.read(part, name)) for name in shards.names(part))
        ARDiffusionPipeline.from_pretrained(str(out))
    assert (tmp_path / "ema" / "dit.safetensors").read_bytes() == (whole / "pipeline" / "dit.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "fsdp", "zero1", "zero3"])
def test_every_engine_survives_a_killed_worker(
    ardiff: Command, cluster: None, latents: Path, tmp_path: Path, engine: str
) -> None:
    check_killed_dit_worker(ardiff, latents, tmp_path, engine)


@pytest.mark.slow
def test_the_adversarial_stage_follows_on_the_first_and_survives_a_killed_worker(
    ardiff: Command, cluster: None, manifest: Path, tmp_path: Path
) -> None:
    """Two ZeRO engines, started from a checkpoint of wider latents."""
    sizes = {"resolution": 32, "patch_size": 8, "num_tokens": 4, "width": 32, "depth": 1, "num_heads": 2}
    common = [f"clips.manifest={manifest}", "clips.num_frames=1", *TRAIN, *ENGINES["zero2"], "train.num_workers=2"]
    common += [f"vae.{name}={value}" for name, value in sizes.items()]
    first = tmp_path / "first"
    ardiff("train-vae", "--output", first, *common, "vae.token_dim=12", "train.num_steps=10").expect(0)

    second = [f"init_from={last_checkpoint(first)}", "vae.token_dim=4", "task.adversarial_weight=0.1"]
    second += [f"task.adversarial_from_step={STEPS // 2}", "task.discriminator.width=8", f"train.num_steps={STEPS}"]
    check_killed_worker(ardiff, tmp_path, "train-vae", [*common, *second], "model/vae.safetensors")
    logged = json.loads((tmp_path / "broken" / "history.json").read_text())
    assert [step for step, _ in logged["discriminator_loss"]] == list(range(STEPS // 2 + 10, STEPS + 1, 10))
    assert logged["loss"][0][1] < json.loads((first / "history.json").read_text())["loss"][0][1]


def wait_for_object(server: S3Server, bucket: str, key: str, seconds: float = PATIENCE) -> None:
    """Waits until the bucket holds an object ``key``."""
    client, deadline = server.client(), time.monotonic() + seconds
    while not client.list_objects_v2(Bucket=bucket, Prefix=key).get("KeyCount"):
        assert time.monotonic() < deadline, f"no {key}"
        time.sleep(0.1)


LIST = "run/ray/checkpoint_manager_snapshot.json"


def registered_step(server: S3Server, bucket: str) -> int:
    """The step of the latest checkpoint on Ray Train's list."""
    content = json.loads(server.client().get_object(Bucket=bucket, Key=LIST)["Body"].read())
    return int(content["latest_checkpoint_result"]["metrics"]["step"])


def wait_for_step(server: S3Server, bucket: str, step: int, seconds: float = PATIENCE) -> None:
    """Waits until a checkpoint of that step or a later one is being stored."""
    client, deadline = server.client(), time.monotonic() + seconds
    while True:
        found = client.list_objects_v2(Bucket=bucket, Prefix="run/ray/checkpoint-").get("Contents", [])
        if any(int(item["Key"].split("checkpoint-")[1][:8]) >= step for item in found):
            return
        assert time.monotonic() < deadline, f"no checkpoint of step {step}"
        time.sleep(0.1)


@pytest.mark.slow
def test_training_to_s3_goes_on_while_the_server_is_away(
    ardiff: Command, cluster: None, latents: Path, tmp_path: Path
) -> None:
    """Checkpoints fail meanwhile, and the run ends with the weights of an undisturbed run."""
    own, log = Jobs(), tmp_path / "log"
    steps = ["train.num_steps=400", "train.checkpoint_every=50", "train.save_patience=1000"]
    whole = settings(latents, "zero2") + steps
    ardiff("train-dit", "--output", tmp_path / "whole", *whole).expect(0)
    with S3Server() as server:
        own.environment |= server.environment()
        bucket = server.make_bucket()
        process = own.start("train_dit", "--output", f"s3://{bucket}/run", *whole, "storage.retry_seconds=1", log=log)
        wait_for_object(server, bucket, LIST)  # not while Ray itself writes there
        server.stop()
        wait_for_line(log, "could not be stored")
        server.start()
        assert process.wait(400) == 0, log.read_text()
        stored = server.client().get_object(Bucket=bucket, Key="run/pipeline/dit.safetensors")["Body"].read()
    assert stored == (tmp_path / "whole" / "pipeline" / "dit.safetensors").read_bytes()
    own.close()


@pytest.mark.slow
def test_training_to_s3_waits_for_a_server_that_is_away_at_any_moment(
    ardiff: Command, cluster: None, latents: Path, tmp_path: Path
) -> None:
    """With a checkpoint every two steps, the server is sometimes away while Ray Train writes its list."""
    own, log = Jobs(), tmp_path / "log"
    steps = ["train.num_steps=100", "train.checkpoint_every=2"]
    whole = settings(latents, "torch") + steps
    ardiff("train-dit", "--output", tmp_path / "whole", *whole).expect(0)
    with S3Server() as server:
        own.environment |= server.environment()
        bucket = server.make_bucket()
        process = own.start("train_dit", "--output", f"s3://{bucket}/run", *whole, log=log)
        for step in (2, 10, 20, 30):
            wait_for_step(server, bucket, step)
            server.stop()
            time.sleep(3)
            server.start()
        assert process.wait(400) == 0, log.read_text()
        assert "could not be stored" not in log.read_text()
        stored = server.client().get_object(Bucket=bucket, Key="run/pipeline/dit.safetensors")["Body"].read()
    assert stored == (tmp_path / "whole" / "pipeline" / "dit.safetensors").read_bytes()
    own.close()


@pytest.mark.slow
def test_a_job_killed_during_an_upload_resumes_from_the_checkpoint_before(
    ardiff: Command, cluster: None, latents: Path, tmp_path: Path
) -> None:
    """Training goes on while the S3 server is away, and the upload of a checkpoint waits for it."""
    own, log, every = Jobs(), tmp_path / "log", 50
    run = [*settings(latents, "zero2"), "train.num_steps=300", f"train.checkpoint_every={every}"]
    ardiff("train-dit", "--output", tmp_path / "whole", *run).expect(0)
    with S3Server() as server:
        own.environment |= server.environment()
        bucket = server.make_bucket()
        process = own.start("train_dit", "--output", f"s3://{bucket}/run", *run, log=log)
        wait_for_object(server, bucket, LIST)
        registered = registered_step(server, bucket)
        server.stop()
        later = "|".join(str(registered + step) for step in range(every + 1, 2 * every + 1))
        wait_for_line(log, rf"AR-DiT: ({later})/")
        assert own.kill(process).code == -9
        server.start()
        assert registered_step(server, bucket) == registered
        result = own.run("train_dit", "--output", f"s3://{bucket}/run", *run)
        assert f"resuming from the checkpoint of step {registered}" in result.expect(0)
        stored = server.client().get_object(Bucket=bucket, Key="run/pipeline/dit.safetensors")["Body"].read()
    assert stored == (tmp_path / "whole" / "pipeline" / "dit.safetensors").read_bytes()
    own.close()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "zero3"])
def test_the_whole_job_survives_being_killed(
    jobs: Jobs, ardiff: Command, cluster: None, latents: Path, tmp_path: Path, engine: str
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    ardiff("train-dit", "--output", whole, *settings(latents, engine)).expect(0)
    process = jobs.start("train_dit", "--output", str(broken), *settings(latents, engine))
    wait_for_checkpoint(broken, process)
    assert jobs.kill(process).code == -9
    assert jobs.left_over() == []
    assert snapshot(broken)["metrics"]["step"] < STEPS, "the run ended before it could be killed: raise STEPS"
    ardiff("train-dit", "--output", broken, "--resume", "latest", *settings(latents, engine)).expect(0)
    assert_equal_checkpoints(whole, broken)


@pytest.mark.slow
def test_an_error_on_one_of_two_workers_ends_the_job_with_one_line(
    ardiff: Command, cluster: None, latents: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "latents"
    shutil.copytree(latents, broken)
    (broken / "part-3.parquet").write_bytes(b"PAR1 this is none")
    result = ardiff("train-dit", "--output", tmp_path / "run", *settings(broken, "torch"))
    assert result.code == 1
    assert "part-3.parquet" in result.complaint
