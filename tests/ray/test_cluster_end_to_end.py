"""The whole path by submitted jobs on a cluster of two nodes with S3 and a token; one node is killed."""

import io
import json
import signal
import time
from collections.abc import Iterator

import pyarrow.parquet as pq
import pytest
from clusters import Cluster
from jobs import section
from s3_server import S3Server
from test_submit import Laptop

from ardiff.data import storage

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2400)]
PATIENCE = 900.0
"""Seconds for a job that takes a minute on an idle machine."""

SYNTHETIC = {"num_train": 24, "num_test": 16, "num_frames": 8, "num_long": 0, "resolution": 16, "radius": 3}
VAE = {"resolution": 16, "patch_size": 8, "num_tokens": 2, "token_dim": 4, "width": 16, "depth": 1, "num_heads": 2}
DIT = {"num_frames": 8, "num_tokens": 2, "token_dim": 4, "width": 32, "depth": 2, "num_heads": 2, "num_classes": 4}
TRAIN = ["train.num_workers=2", "train.engine=deepspeed", "train.cpu_threads=2", "train.loading_tasks=1"]
TRAIN += ["train.batch_size=8", "train.log_every=2"]


@pytest.fixture
def cluster(s3_bucket: str) -> Iterator[Cluster]:
    """A head and a node, each with CPUs for one worker. Only they have the credentials of the bucket."""
    cluster = Cluster(head_cpus=3)
    try:
        cluster.add_node(cpus=3)
        yield cluster
    finally:
        cluster.close()


def checkpoints(folder: str) -> int:
    """The step of the last complete checkpoint, 0 without one."""
    place = storage.join(folder, "ray", "checkpoint_manager_snapshot.json")
    if not storage.exists(place):
        return 0
    latest = json.loads(storage.read_bytes(place))["latest_checkpoint_result"]
    return int(latest["metrics"]["step"]) if latest else 0


def wait_for_step(folder: str, step: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while checkpoints(folder) < step:
        assert time.monotonic() < deadline, f"no checkpoint of step {step} in {folder}"
        time.sleep(0.3)


def test_from_videos_to_scores_with_a_node_killed(cluster: Cluster, s3_bucket: str, s3_server: S3Server) -> None:
    laptop, place = Laptop(cluster), f"{s3_bucket}/runs"

    def submit(job: str, *arguments: str) -> str:
        result = laptop.run("submit", job, *arguments, timeout=PATIENCE)
        assert result.code == 0, f"{job}: {result.out[-4000:]}{result.err[-4000:]}"
        return result.out

    submit("prepare", f"output={place}/data", *section("synthetic", SYNTHETIC))
    manifest = f"{place}/data/manifest.parquet"
    submit("train-vae", f"output={place}/vae", f"clips.manifest={manifest}", "clips.num_frames=8", *TRAIN,
           *section("vae", VAE), "train.deepspeed.stage=2", "train.num_steps=4")  # fmt: skip
    submit("encode", f"manifest={manifest}", f"vae={place}/vae/model", f"output={place}/latents", "num_frames=8",
           "max_actors=2", "batch_size=4")  # fmt: skip
    [description] = [f for f in storage.list_files(f"{place}/latents") if f.endswith("latents.json")]

    dit = [f"latents={description.removesuffix('/latents.json')}", f"output={place}/dit", *TRAIN, *section("dit", DIT)]
    dit += ["train.deepspeed.stage=3", "train.min_workers=1", "train.max_failures=3", "train.resize_interval=2"]
    dit += ["train.checkpoint_every=2"]
    process = laptop.start("submit", "train-dit", *dit, "train.num_steps=100000")
    try:
        # A node dies: training resumes on the other.
        wait_for_step(f"{place}/dit", 4)
        cluster.kill_node(cluster.nodes[1])
        wait_for_step(f"{place}/dit", checkpoints(f"{place}/dit") + 4)
        # Ctrl-C on the laptop stops it. It is submitted again with fewer steps.
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "resuming from the checkpoint of step" in out
    assert "with 1 of 2 workers" in out
    reached = checkpoints(f"{place}/dit")
    out = submit("train-dit", *dit, f"train.num_steps={reached + 4}")
    assert f"resuming from the checkpoint of step {reached} with 1 of 2 workers" in out
    losses = json.loads(storage.read_bytes(f"{place}/dit/history.json"))["loss"]
    assert [step for step, _ in losses] == list(range(2, reached + 5, 2))

    # Two values of ar_step, the four classes, one seed each.
    submit("sweep", f"grid.checkpoints=[{place}/dit/pipeline]", f"output={place}/sweep", "grid.axes.ar_step=[2,4]",
           "grid.sampling.num_frames=8", "grid.sampling.num_inference_steps=4", "grid.seeds=1",
           "batch_size=4")  # fmt: skip
    rows = pq.read_table(io.BytesIO(storage.read_bytes(f"{place}/sweep/manifest.parquet"))).to_pylist()
    assert sorted((row["ar_step"], row["class_label"], row["status"]) for row in rows) == [
        (step, label, "ok") for step in (2, 4) for label in range(4)
    ]
    cells = [f for f in storage.list_files(f"{place}/sweep/cells") if f.endswith("manifest.parquet")]
    assert len(cells) == 2
    submit("evaluate-quick", f"real={manifest}", f"fake=[{','.join(cells)}]", f"output={place}/scores",
           "num_clips=4", "num_frames=8", "resolution=16", "batch_size=4", "controls=false")  # fmt: skip
    scores = json.loads(storage.read_bytes(f"{place}/scores/scores.json"))
    assert len(scores["sets"]) >= 3  # real clips and two cells
    commits = {(job["metadata"] or {}).get("commit") for job in laptop.jobs()}
    assert json.loads(storage.read_bytes(f"{place}/dit/versions.json"))["git"] in commits
