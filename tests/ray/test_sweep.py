"""Sweeps: every video once and always with the same frames, whatever is killed, stopped or run twice."""

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from s3_server import S3Server, environment
from text_encoders import write_encoder

from ardiff.cli import main
from ardiff.data import storage
from ardiff.data.config import SyntheticConfig
from ardiff.data.manifest import read_manifest, write_manifest
from ardiff.data.synthetic_set import write_video
from ardiff.sweep.manifest import read_manifest as read_sweep_manifest
from ardiff.text.encoder import TextEncoder

pytestmark = pytest.mark.ray

SMALL = [
    "grid.axes.ar_step=[1,4]",
    "grid.sampling.num_frames=12",
    "grid.sampling.num_inference_steps=4",
    "grid.seeds=2",
    "cpu_threads=1",
]
LONG = [
    "grid.sampling.ar_step=8",
    "grid.sampling.num_frames=100",
    "grid.sampling.num_inference_steps=8",
    "grid.seeds=4",
    "batch_size=2",
]
"""Twelve videos of a second or two each, so that a process can be killed in between."""


@pytest.fixture(scope="module")
def checkpoint(make_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny pipeline of three classes that sees 8 frames at once."""
    folder = tmp_path_factory.mktemp("model") / "pipeline"
    make_pipeline().save_pretrained(str(folder))
    return str(folder)


Sweep = Callable[..., tuple[int, str]]


@pytest.fixture
def sweep(cluster: None, checkpoint: str, capfd: pytest.CaptureFixture[str]) -> Sweep:
    """``sweep(output, "key=value", ...)``: the exit code and the error output."""

    def run(output: Path, *settings: str) -> tuple[int, str]:
        capfd.readouterr()
        code = main(["sweep", f"grid.checkpoints=[{checkpoint}]", f"output={output}", *SMALL, *settings])
        return code, capfd.readouterr().err

    return run


def arguments(checkpoint: str, output: object, *settings: str) -> list[str]:
    return [f"grid.checkpoints=[{checkpoint}]", f"output={output}", "cpu_threads=1", *LONG, *settings]


def lines_of(output: object) -> list[dict[str, Any]]:
    """The manifest, after checks that hold for every one: no video is listed twice, and files match their rows."""
    lines = read_sweep_manifest(f"{output}/manifest.parquet")
    assert len({line["id"] for line in lines}) == len(lines)
    made = [line for line in lines if line["status"] == "ok"]
    assert len({line["frames_sha256"] for line in made}) == len(made)
    assert all(storage.size(line["uri"]) == line["file_size"] for line in made)
    files = storage.list_files(f"{output}/videos") if made else []
    assert sorted(files) == sorted(line["uri"] for line in made)
    return lines


def frames(lines: list[dict[str, Any]]) -> dict[str, str]:
    return {line["id"]: line["frames_sha256"] for line in lines}


def records_in(output: object) -> list[str]:
    with contextlib.suppress(Exception):
        return storage.list_files(f"{output}/records")
    return []


def wait_for_records(process: Any, output: object, count: int) -> list[str]:
    """Waits until the running job has stored ``count`` videos."""
    deadline = time.monotonic() + 300
    while len(found := records_in(output)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no videos in five minutes"
        time.sleep(0.1)
    return found


# In one Ray session


@pytest.fixture(scope="module")
def reference(cluster: None, checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small grid by one actor, in batches of a whole sweep point."""
    output = tmp_path_factory.mktemp("reference") / "out"
    assert main(["sweep", f"grid.checkpoints=[{checkpoint}]", f"output={output}", *SMALL]) == 0
    return output


def test_every_video_of_the_grid_is_generated_once(reference: Path) -> None:
    lines = lines_of(reference)
    assert len(lines) == 2 * 3 * 2  # ar_steps, classes, seeds
    settings = {(line["ar_step"], line["class_label"], line["seed"]) for line in lines}
    assert settings == {(a, c, s) for a in (1, 4) for c in range(3) for s in range(2)}
    assert {line["status"] for line in lines} == {"ok"}
    assert {(line["batch_size"], line["attempts"], line["device"]) for line in lines} == {(6, 1, "cpu")}
    for point in {line["point"] for line in lines}:
        records = read_manifest(str(reference / "points" / point / "manifest.parquet"))
        assert [r.label for r in records] == [0, 1, 2, 0, 1, 2]
    page = (reference / "report.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert page.count("data:video/mp4") == 4  # two points, best, worst
    assert "ardiff sweep" in page


@pytest.mark.slow
def test_three_actors_and_batches_of_one_change_no_bit(sweep: Sweep, reference: Path, tmp_path: Path) -> None:
    code, err = sweep(tmp_path / "o", "min_actors=3", "max_actors=3", "batch_size=1")
    assert code == 0, err
    lines, expected = lines_of(tmp_path / "o"), lines_of(reference)
    assert frames(lines) == frames(expected)
    assert [line["file_sha256"] for line in lines] == [line["file_sha256"] for line in expected]
    assert {line["batch_size"] for line in lines} == {1}


def test_two_actors_change_no_bit_and_again_generates_only_what_is_missing_or_damaged(
    sweep: Sweep, reference: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert sweep(output, "keep_latents=true", "min_actors=2", "max_actors=2", "batch_size=4")[0] == 0
    before, expected = lines_of(output), lines_of(reference)
    assert frames(before) == frames(expected)
    assert [line["file_sha256"] for line in before] == [line["file_sha256"] for line in expected]
    assert {line["batch_size"] for line in before} == {2, 4}
    Path(before[0]["uri"]).unlink()
    Path(before[3]["uri"]).write_bytes(b"half")
    Path(before[5]["latents"]).unlink()
    record = next((output / "records").rglob(f"*{before[7]['id']}*"))
    record.write_text(record.read_text()[:99])
    stamps = {line["uri"]: Path(line["uri"]).stat().st_mtime_ns for line in before[8:]}
    code, err = sweep(output, "keep_latents=true")
    assert code == 0
    assert "4 videos generated, 8 were complete, 0 failed" in err
    assert frames(lines_of(output)) == frames(before)
    assert [line["file_sha256"] for line in lines_of(output)] == [line["file_sha256"] for line in before]
    assert {uri: Path(uri).stat().st_mtime_ns for uri in stamps} == stamps
    # A larger grid uses the videos that exist.
    code, err = sweep(output, "keep_latents=true", "grid.seeds=3")
    assert "6 videos generated, 12 were complete" in err
    assert len(lines_of(output)) == 18
    code, err = sweep(output, "crf=20")
    assert code == 2
    assert "give another output" in err


@pytest.mark.slow
def test_invalid_videos_are_recorded_and_the_others_are_generated(
    sweep: Sweep, reference: Path, tmp_path: Path
) -> None:
    """A class that the model lacks; batches that do not fit into the cache, and videos that do not even fit alone."""
    drawn = SyntheticConfig(num_train=1, num_test=6, num_frames=24, num_long=0)
    real = tmp_path / "real"
    write_manifest(f"{real}/manifest.parquet", [write_video(drawn, str(real), i, "test") for i in range(6)])
    output = tmp_path / "out"
    code, err = sweep(
        output,
        "engine.max_cache_bytes=9000",  # a video has 4096 and a class 3584; with guidance twice that
        "grid.axes.guidance_scale=[1,2]",
        "grid.classes=[0,1,2,7]",
        "grid.axes.ar_step=[1]",
        "batch_size=4",
        "evaluate=quick",
        f"real={real}/manifest.parquet",
        *("quick.num_clips=3", "quick.batch_size=3", "quick.resolution=16"),
        *("quick.num_frames=12", "quick.controls=false"),
    )
    assert code == 1
    assert err.rstrip().endswith("The same command tries the failed videos again.")
    assert "Traceback" not in err
    assert "ardiff: 10 of 16 videos could not be generated; all others are complete." in err
    lines = lines_of(output)
    found = {(line["guidance_scale"], line["class_label"] == 7): line for line in lines}
    assert [found[k]["status"] for k in ((1.0, False), (1.0, True), (2.0, False), (2.0, True))] == ["ok"] + [
        "failed"
    ] * 3
    valid = [line for line in lines if line["class_label"] < 7]
    attempts = {
        scale: {(x["batch_size"], x["attempts"]) for x in valid if x["guidance_scale"] == scale} for scale in (1.0, 2.0)
    }
    assert attempts[1.0] == {(1, 3), (1, 2)}  # of a batch of four, and of two
    assert attempts[2.0] == {(0, 4), (0, 3)}  # twice alone
    assert frames(lines_of(reference)).items() >= frames([x for x in lines if x["status"] == "ok"]).items()
    assert "class_label 7 is out of range" in found[1.0, True]["message"]
    assert found[1.0, True]["attempts"] == 0
    assert found[2.0, False]["error"] == "EngineLimitError"
    assert re.search(r"6 x EngineLimitError: .* the limit is 0 MiB", err)
    assert "is not scored: it has 0 videos" in err
    page = (output / "report.html").read_text()
    assert "not scored" in page
    assert "class_label 7 is out of range" in page
    assert not (output / "stage.json").exists()
    code, err = sweep(output, "grid.axes.ar_step=[1]")
    assert code == 0
    assert "0 videos generated, 6 were complete, 0 failed" in err


def test_a_grid_without_a_valid_video_is_rejected(sweep: Sweep, tmp_path: Path) -> None:
    code, err = sweep(tmp_path / "out", "grid.axes.ar_step=[9]")
    assert code == 2
    assert "No video of the grid can be generated: ar_step must be between" in err
    code, err = sweep(tmp_path / "out", "min_actors=99", "max_actors=99")
    assert code == 2
    assert "99 actors of 1 CPUs each are more than" in err
    assert sweep(tmp_path / "out", "evaluate=quick")[0] == 2


def test_scores_that_are_impossible_fail_first_or_leave_a_report(sweep: Sweep, tmp_path: Path) -> None:
    real = tmp_path / "real"
    record = write_video(SyntheticConfig(num_test=1, num_frames=24), str(real), 0, "test")
    write_manifest(f"{real}/manifest.parquet", [record])
    real_videos = f"real={real}/manifest.parquet"
    published = ("evaluate=published", "scores.num_clips=2", "scores.num_frames=12")
    code, err = sweep(tmp_path / "out", real_videos, *published)
    assert code == 1
    assert "ardiff weights fetch i3d" in err
    assert not (tmp_path / "out").exists()  # before any video is generated
    Path(record.uri).unlink()
    quick = ("quick.num_clips=2", "quick.num_frames=12", "quick.batch_size=2", "quick.resolution=16")
    code, err = sweep(tmp_path / "out", real_videos, "evaluate=quick", *quick)
    assert code == 1
    assert "Traceback" not in err
    assert len(lines_of(tmp_path / "out")) == 12
    assert "Nothing is scored: " in (tmp_path / "out" / "report.html").read_text()
    assert not (tmp_path / "out" / "stage.json").exists()


# What is killed, stopped or run twice


@pytest.fixture(scope="module")
def expected(cluster: None, checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Frames of the long grid, by one actor without interruption."""
    output = tmp_path_factory.mktemp("expected") / "out"
    assert main(["sweep", *arguments(checkpoint, output), "batch_size=12"]) == 0
    return frames(lines_of(output))


@pytest.mark.slow
def test_killed_actors_and_drivers_cost_what_was_in_flight(
    jobs: Any, checkpoint: str, expected: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = jobs.start("sweep", *arguments(checkpoint, output, "min_actors=2", "max_actors=2"), log=tmp_path / "log")
    first = wait_for_records(process, output, 2)[0]
    worker = re.search(r'"worker": ".*:(\d+)"', Path(first).read_text())
    assert worker is not None
    os.kill(int(worker[1]), signal.SIGKILL)
    wait_for_records(process, output, 5)
    jobs.kill(process)
    there = len(records_in(output))
    result = jobs.run("sweep", *arguments(checkpoint, output, "max_actors=2"))
    assert result.code == 0, result.err
    counts = re.search(r"(\d+) videos generated, (\d+) were complete, 0 failed", result.err)
    assert counts is not None
    assert int(counts[2]) >= there  # actors end some time after their driver
    assert int(counts[1]) + int(counts[2]) == 12
    lines = lines_of(output)
    assert frames(lines) == expected
    assert sum(line["attempts"] > 1 for line in lines) <= 2  # of the batch whose actor was killed

    # After the death of an actor the job goes on without help.
    process = jobs.start("sweep", *arguments(checkpoint, tmp_path / "b", "max_actors=1"), log=tmp_path / "log")
    first = wait_for_records(process, tmp_path / "b", 1)[0]
    worker = re.search(r'"worker": ".*:(\d+)"', Path(first).read_text())
    assert worker is not None
    os.kill(int(worker[1]), signal.SIGKILL)
    assert process.wait(300) == 0, (tmp_path / "log").read_text()
    lines = lines_of(tmp_path / "b")
    assert frames(lines) == expected
    assert len({line["worker"] for line in lines}) == 2
    assert "12 videos generated, 0 were complete, 0 failed" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_actors_are_added_while_there_are_batches(
    jobs: Any, checkpoint: str, expected: dict[str, str], tmp_path: Path
) -> None:
    settings = ("batch_size=1", "max_actors=2", "grid.seeds=8")
    result = jobs.run("sweep", *arguments(checkpoint, tmp_path / "out", *settings))
    assert result.code == 0, result.err
    lines = lines_of(tmp_path / "out")
    assert frames(lines).items() >= expected.items()
    assert len({line["worker"] for line in lines}) == 2


@pytest.mark.slow
def test_two_jobs_at_once_on_s3_share_the_work(
    jobs: Any, checkpoint: str, expected: dict[str, str], s3_server: S3Server, tmp_path: Path
) -> None:
    with environment(s3_server.environment()):
        output = f"s3://{s3_server.make_bucket()}/out"
        jobs.environment |= s3_server.environment()
        logs = [tmp_path / f"{n}.log" for n in range(2)]
        both = [jobs.start("sweep", *arguments(checkpoint, output), log=log) for log in logs]
        for process, log in zip(both, logs, strict=True):
            assert process.wait(400) == 0, log.read_text()
        lines = lines_of(output)
        assert frames(lines) == expected
        assert len(records_in(output)) == 12
        assert not [f for f in storage.list_files(output) if "/." in f]


@pytest.mark.slow
def test_an_s3_server_that_is_away_for_a_while(
    jobs: Any, checkpoint: str, expected: dict[str, str], tmp_path: Path
) -> None:
    with S3Server() as server, environment(server.environment()):
        output = f"s3://{server.make_bucket()}/out"
        jobs.environment |= server.environment()
        process = jobs.start("sweep", *arguments(checkpoint, output), log=tmp_path / "log")
        wait_for_records(process, output, 3)
        server.stop()
        time.sleep(8)
        assert process.poll() is None, (tmp_path / "log").read_text()
        server.start()
        assert process.wait(400) == 0, (tmp_path / "log").read_text()
        lines = lines_of(output)
        assert frames(lines) == expected
        assert {line["attempts"] for line in lines} == {1}


def test_a_sweep_over_prompts(cluster: None, make_pipeline: Any, tmp_path: Path) -> None:
    encoder = TextEncoder.load(write_encoder(tmp_path / "encoder"))
    text = {"condition": "cross_attention", "condition_dim": encoder.dim, "text_encoder": encoder}
    make_pipeline(**text).save_pretrained(str(tmp_path / "model"))
    prompts = '["a red ring moves <b>right</b>", "a blue square"]'
    settings = [f"grid.checkpoints=[{tmp_path}/model]", f"grid.prompts={prompts}", *SMALL]
    hashes = []
    for size in (1, 16):
        assert main(["sweep", *settings, f"output={tmp_path}/{size}", f"batch_size={size}"]) == 0
        lines = lines_of(tmp_path / str(size))
        assert len(lines) == 2 * 2 * 2  # points, prompts, seeds
        assert {(line["prompt"], line["class_label"]) for line in lines} == {
            ("a red ring moves <b>right</b>", None),
            ("a blue square", None),
        }
        hashes.append(frames(lines))
    assert hashes[0] == hashes[1]
    report = (tmp_path / "16" / "report.html").read_text()
    assert "“a red ring moves &lt;b&gt;right&lt;/b&gt;”, seed 0" in report
    assert "“a blue square”, seed 0" in report
    assert "2 prompts" in report
    assert "<b>right" not in report
