"""Bad input gives one clear sentence and the right exit code, and leaves no partial output.

Everything runs in this process: what a job checks before it starts Ray without Ray, the rest in one Ray session, which
the jobs join.
"""

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from jobs import Result

from ardiff.config import find_config, load_config
from ardiff.data.config import ClipConfig
from ardiff.data.encode import encode_video
from ardiff.data.error_log import read_errors
from ardiff.data.latents import (
    LatentSet,
    LatentStatistics,
    latent_table,
    read_description,
    read_labelled_keys,
    write_description,
)
from ardiff.data.manifest import VideoRecord, read_manifest, write_manifest
from ardiff.errors import DataError
from ardiff.pipeline import ARDiffusionPipeline
from ray_jobs.prepare import PrepareConfig
from ray_jobs.quickstart import QuickstartConfig, encode_data
from ray_jobs.runtime.stages import StageRunner

pytestmark = pytest.mark.ray


Command = Callable[..., Result]


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if Ray is started: the job must check its input first."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("Ray was started before the input was checked")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", refuse)


@pytest.fixture
def pipeline(make_pipeline: Any, tmp_path: Path) -> Path:
    """A tiny pipeline of three classes that sees 8 frames at once."""
    make_pipeline().save_pretrained(str(tmp_path / "pipeline"))
    return tmp_path / "pipeline"


@pytest.fixture
def latents(make_vae: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "latents"
    folder.mkdir()
    columns = {"latents": np.zeros((4, 8, 2, 4)), "label": np.arange(4) % 3}
    pq.write_table(latent_table(columns), folder / "part.parquet")
    statistics = LatentStatistics([[0.0] * 4] * 2, 1.0)
    description = LatentSet("made", 8, 2, 4, ["a", "b", "c"], ["part.parquet"], [4], statistics, str(tmp_path / "vae"))
    write_description(str(folder), description)
    return folder


def video(frames: int = 12, height: int = 38, width: int = 50, codec: Any = "h264", seed: int = 0) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (frames, height // 2, width // 2, 3), dtype=np.uint8)
    return encode_video(coarse.repeat(2, axis=1).repeat(2, axis=2), 8.0, codec)


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def record(uri: str, frames: int, split: str = "train") -> VideoRecord:
    return VideoRecord(uri, 1, "h264", 50, 38, 8.0, frames, 0, "video", split, "ok", "")


# Refused by the configuration, before anything is imported that could start


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train-dit", "train.optimzer.lr=1e-4"], "'train.optimzer': did you mean 'train.optimizer'?"),
        (["quickstart", "train_vae.vae.widht=32"], "'train_vae.vae.widht': did you mean 'train_vae.vae.width'?"),
        (["train-vae", "train.num_steps=many"], "'train.num_steps' must be of type int, not 'many'"),
        (["generate", "num_videos=1.5"], "'num_videos' must be of type int, not 1.5"),
        (["train-vae", "vae=3"], "'vae' is a section"),
        (["train-vae", "train.device=tpu"], "'train.device' must be one of auto, cpu, cuda, not 'tpu'"),
        (["encode", "clip_step=0"], "clip_step"),
        (["train-vae", "vae.resolution=30", "vae.patch_size=8"], "vae: resolution 30 must be a multiple of patch_size"),
        (["train-dit", "--config", "/nowhere/x.yaml"], "Cannot read the configuration /nowhere/x.yaml"),
        (["quickstart", "samples.ar_steps=[0,21]"], "21"),
        (["quickstart", "evaluate.num_clips=256"], "generate.num_videos must be at least evaluate.num_clips"),
        (["quickstart", "--output", "s3://bucket/run"], "local folder"),
    ],
)
def test_wrong_configuration(
    ardiff: Command, no_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = ardiff(*arguments)
    assert outcome.code == 2
    assert message in outcome.complaint
    assert list(tmp_path.iterdir()) == []


# Refused by a look at the input, before Ray is started


def test_missing_and_empty_folder(ardiff: Command, no_ray: None, tmp_path: Path) -> None:
    output = tmp_path / "data"
    outcome = ardiff("prepare", "--source", tmp_path / "nowhere", "--output", output)
    assert outcome.code == 1
    assert f"There is no folder {tmp_path / 'nowhere'}" in outcome.complaint
    (tmp_path / "empty").mkdir()
    outcome = ardiff("prepare", "--source", tmp_path / "empty", "--output", output)
    assert outcome.code == 1
    assert f"There is no video in {tmp_path / 'empty'}" in outcome.complaint
    assert not output.exists()


def test_missing_inputs(ardiff: Command, no_ray: None, tmp_path: Path) -> None:
    nowhere, output = str(tmp_path / "nowhere"), str(tmp_path / "output")
    write_manifest(str(tmp_path / "manifest.parquet"), [record("a.mp4", 16), record("b.mp4", 16, "test")])
    manifest = str(tmp_path / "manifest.parquet")
    cases = {
        "There is no manifest": [
            ["train-vae", f"clips.manifest={nowhere}"],
            ["encode", "--manifest", nowhere],
            ["evaluate", "--real", nowhere, "--fake", manifest],
            ["evaluate-quick", "--real", manifest, f"fake=[{nowhere}/manifest.parquet]"],
        ],
        "There is no trained model": [
            ["encode", "--manifest", manifest, "--vae", nowhere],
            ["generate", "--pipeline", nowhere],
        ],
        "no complete set of latents": [["train-dit", "--latents", nowhere]],
    }
    for message, commands in cases.items():
        for command in commands:
            outcome = ardiff(*command, "--output", output)
            assert outcome.code == 1, command
            assert message in outcome.complaint
            assert nowhere in outcome.complaint
    assert not Path(output).exists()


def test_videos_shorter_than_a_clip(ardiff: Command, no_ray: None, tmp_path: Path) -> None:
    manifest, output = str(tmp_path / "manifest.parquet"), tmp_path / "output"
    write_manifest(manifest, [record("a.mp4", 9), record("b.mp4", 12), record("c.mp4", 11, "test")])
    for command in (
        ["train-vae", f"clips.manifest={manifest}", "clips.num_frames=16"],
        ["train-vae", f"clips.manifest={manifest}", "clips.num_frames=8", "clips.stride=2"],
        ["encode", "--manifest", manifest, "num_frames=16"],
    ):
        outcome = ardiff(*command, "--output", output)
        assert outcome.code == 1
        assert "All 2 videos of the 'train' split are shorter" in outcome.complaint
        assert "the shortest has 9, the longest 12" in outcome.complaint
    outcome = ardiff("evaluate", "--real", manifest, "--fake", manifest, "--output", output)
    assert outcome.code == 1
    assert "All 1 videos of the 'test' split are shorter than the 16 frames" in outcome.complaint
    assert not output.exists()


@pytest.mark.parametrize(("train", "test", "split"), [(15, 20, "train"), (20, 15, "test")])
def test_the_quickstart_looks_at_lengths_before_it_trains(tmp_path: Path, train: int, test: int, split: str) -> None:
    data, config = PrepareConfig(output=str(tmp_path)), load_config(QuickstartConfig, [find_config("quickstart")])
    config = replace(config, train_vae=replace(config.train_vae, clips=ClipConfig(num_frames=4)))
    write_manifest(data.manifest, [record("a.mp4", train), record("b.mp4", test, "test")])
    with pytest.raises(DataError, match=f"All 1 videos of the '{split}' split are shorter than the 16 frames"):
        encode_data(config, str(tmp_path / "run"), data, StageRunner(lambda: pytest.fail("a stage was begun")))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("dit.num_tokens=3", "dit.num_tokens is 3, but the latents of {} have 2"),
        ("dit.token_dim=8", "dit.token_dim is 8, but the latents of {} have 4"),
        ("dit.num_frames=4", "dit.num_frames is 4, but the clips of {} have 8 frames"),
        ("dit.num_classes=5", "dit.num_classes is 5, but {} has 3 classes"),
    ],
)
def test_model_that_does_not_fit_the_latents(
    ardiff: Command, no_ray: None, latents: Path, tmp_path: Path, setting: str, message: str
) -> None:
    sizes = ["dit.num_tokens=2", "dit.token_dim=4", "dit.num_frames=8", "dit.num_classes=3", "dit.width=64"]
    outcome = ardiff("train-dit", "--latents", latents, "--output", tmp_path / "dit", *sizes, setting)
    assert outcome.code == 2
    assert message.format(latents) in outcome.complaint
    assert not (tmp_path / "dit").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--ar-step", "51"], "ar_step"),
        (["--ar-step=-1"], "ar_step"),
        (["--num-frames", "40", "--ar-step", "1"], "ar_step"),
        (["--class-label", "3", "--num-frames", "8"], "class_label 3 is out of range: the model has classes 0..2"),
        (["--num-inference-steps", "1001", "--ar-step", "1000"], "num_inference_steps"),
    ],
)
def test_generation_out_of_range(
    ardiff: Command, no_ray: None, pipeline: Path, tmp_path: Path, settings: list[str], message: str
) -> None:
    outcome = ardiff("generate", "--pipeline", pipeline, "--output", tmp_path / "videos", *settings)
    assert outcome.code == 2
    assert message in outcome.complaint
    assert not (tmp_path / "videos").exists()


def test_pipeline_of_other_sizes(ardiff: Command, no_ray: None, pipeline: Path, make_dit: Any, tmp_path: Path) -> None:
    from ardiff.pretrained import write_model

    write_model(str(tmp_path / "other"), {"kind": "x"}, {"dit": dict(make_dit(width=32).named_parameters())})
    shutil.copy(tmp_path / "other" / "dit.safetensors", pipeline / "dit.safetensors")
    outcome = ardiff("generate", "--pipeline", pipeline, "--output", tmp_path / "videos")
    assert outcome.code == 1
    assert "does not fit the model" in outcome.complaint
    assert not (tmp_path / "videos").exists()


# Found out in Ray


def test_folder_without_a_decodable_video(ardiff: Command, cluster: None, tmp_path: Path) -> None:
    source = put(tmp_path / "source", {f"{i}.mp4": b"These are words, not pictures." * 9 for i in range(3)})
    outcome = ardiff("prepare", "--source", source, "--output", tmp_path / "data")
    assert outcome.code == 1
    assert "None of the 3 videos can be decoded" in outcome.complaint
    assert outcome.err.count("bad ") == 3
    assert [row.error for row in read_errors(str(tmp_path / "data" / "errors.parquet"))] == ["undecodable"] * 3
    assert not (tmp_path / "data" / "stage.json").exists()


def test_truncated_video_becomes_a_row(ardiff: Command, cluster: None, tmp_path: Path) -> None:
    files = {f"{i}.mp4": video(seed=i) for i in range(6)}
    files["4.mp4"] = files["4.mp4"][: len(files["4.mp4"]) // 2]
    source = put(tmp_path / "source", files)
    outcome = ardiff("prepare", "--source", source, "--output", tmp_path / "data")
    assert outcome.code == 0
    assert "5 videos, 60 frames, 1 classes, 1 bad" in outcome.err
    assert f"bad {source}/4.mp4: it" in outcome.err
    [row] = read_errors(str(tmp_path / "data" / "errors.parquet"))
    assert (row.uri, row.clip, row.message) == (
        f"{source}/4.mp4",
        -1,
        read_manifest(str(tmp_path / "data" / "manifest.parquet"))[4].reason,
    )
    records = read_manifest(str(tmp_path / "data" / "manifest.parquet"))
    assert [r.status for r in records] == ["ok"] * 4 + ["error", "ok"]
    assert records[4].reason
    assert (tmp_path / "data" / "stage.json").exists()


def test_the_sheet_does_without_videos_that_are_gone(
    ardiff: Command, cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray_jobs import prepare

    source = put(tmp_path / "source", {f"{i}.mp4": video(seed=i) for i in range(3)})
    draw, sheet = prepare._write_sheet, tmp_path / "data" / "sheet.png"

    def without(*names: str) -> str:
        def late(*arguments: Any) -> None:
            for name in names:
                (source / name).unlink()
            draw(*arguments)

        monkeypatch.setattr(prepare, "_write_sheet", late)
        outcome = ardiff("prepare", source, tmp_path / "data")
        assert outcome.code == 0, outcome.err
        return outcome.err

    assert "2 videos are missing on the sheet" in without("0.mp4", "1.mp4")
    assert sheet.read_bytes().startswith(b"\x89PNG")
    sheet.unlink()
    put(source, {"0.mp4": video(), "1.mp4": video()})
    assert "3 videos are missing on the sheet" in without("0.mp4", "1.mp4", "2.mp4")
    assert not sheet.exists()


def test_video_that_broke_after_it_was_listed(ardiff: Command, cluster: None, make_vae: Any, tmp_path: Path) -> None:
    from ardiff.pretrained import save_autoencoder

    source = put(tmp_path / "source", {f"{i}.mp4": video(seed=i) for i in range(3)})
    write_manifest(str(tmp_path / "m.parquet"), [record(f"{source}/{i}.mp4", 12) for i in range(3)])
    save_autoencoder(str(tmp_path / "vae"), make_vae())
    put(source, {"1.mp4": b"no longer a video"})
    output = tmp_path / "latents"
    outcome = ardiff("encode", "--manifest", tmp_path / "m.parquet", "--vae", tmp_path / "vae", "--output", output)
    assert outcome.code == 1  # all too short for the default clips
    clips = ["num_frames=8", "batch_size=2"]
    outcome = ardiff(
        "encode", "--manifest", tmp_path / "m.parquet", "--vae", tmp_path / "vae", "--output", output, *clips
    )
    assert outcome.code == 1
    assert "1 of 3 clips are bad (33.3%), more than max_bad_fraction=0.05 allows: 1 undecodable" in outcome.complaint
    assert f"{source}/1.mp4" in outcome.complaint
    assert [row.uri for row in read_errors(str(output / "errors.parquet"))] == [f"{source}/1.mp4"]
    assert not list(output.rglob("latents.json"))
    assert not (output / "stage.json").exists()

    put(source, {"1.mp4": video(seed=1)})
    outcome = ardiff(
        "encode", "--manifest", tmp_path / "m.parquet", "--vae", tmp_path / "vae", "--output", output, *clips
    )
    assert outcome.code == 0
    assert len(list(output.rglob("latents.json"))) == 1
    assert read_errors(str(output / "errors.parquet")) == []


def test_generating_into_a_folder_of_other_settings(
    ardiff: Command, cluster: None, pipeline: Path, tmp_path: Path
) -> None:
    output = tmp_path / "videos"
    sizes = ["num_videos=2", "num_frames=4", "num_inference_steps=2", "ar_step=1", "batch_size=2", "cpu_threads=1"]
    command = ["generate", "--pipeline", str(pipeline), "--output", str(output), *sizes]
    assert ardiff(*command).code == 0
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    loaded = ARDiffusionPipeline.from_pretrained(str(pipeline))
    videos = loaded(class_label=[0, 1], num_frames=4, num_inference_steps=2, ar_step=1, seed=[0, 1]).frames.numpy()
    stored = [before[output / "videos" / f"0000{i}.mp4"] for i in range(2)]
    assert stored == [encode_video(v, 8.0, crf=8) for v in videos]
    assert stored[0] != stored[1]
    outcome = ardiff(*command, "guidance_scale=2")
    assert outcome.code == 2
    assert "other settings" in outcome.complaint
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before

    # The same settings resume: the missing video is generated again, with the same bytes.
    (output / "videos" / "00001.mp4").unlink()
    outcome = ardiff(*command)
    assert outcome.code == 0
    assert "1 videos generated, 1 were complete" in outcome.err
    assert (output / "videos" / "00001.mp4").read_bytes() == before[output / "videos" / "00001.mp4"]


# Data of the user's own


def test_own_videos_in_train_and_test_folders(ardiff: Command, cluster: None, tmp_path: Path) -> None:
    files = {
        "train/cats/a.mp4": video(seed=1),
        "train/dogs/b c.webm": video(codec="vp9", frames=9),
        "train/dogs/d.MP4": video(height=64, width=64),
        "test/cats/e.mp4": video(frames=7),
        "train/notes.txt": b"not a video, and no error",
        "train/cats/.hidden.mp4": b"",
    }
    source = put(tmp_path / "own videos", files)
    outcome = ardiff("prepare", "--source", f"{source}/", "--output", tmp_path / "data")
    assert outcome.code == 0, outcome.err
    records = {
        r.uri.removeprefix(f"{source}/"): (r.split, r.class_name, r.label, r.codec, r.width, r.height, r.num_frames)
        for r in read_manifest(str(tmp_path / "data" / "manifest.parquet"))
    }
    assert records == {
        "train/cats/a.mp4": ("train", "cats", 0, "h264", 50, 38, 12),
        "train/dogs/b c.webm": ("train", "dogs", 1, "vp9", 50, 38, 9),
        "train/dogs/d.MP4": ("train", "dogs", 1, "h264", 64, 64, 12),
        "test/cats/e.mp4": ("test", "cats", 0, "h264", 50, 38, 7),
    }


def test_own_videos_in_class_folders_are_split_and_encoded(
    ardiff: Command, cluster: None, make_vae: Any, tmp_path: Path
) -> None:
    from ardiff.pretrained import save_autoencoder

    source = put(tmp_path / "own", {f"{'ab'[i % 2]}/{i}.mp4": video(seed=i) for i in range(6)})
    outcome = ardiff("prepare", "--source", source, "--output", tmp_path / "data", "test_fraction=0.3")
    assert outcome.code == 0, outcome.err
    manifest = tmp_path / "data" / "manifest.parquet"
    records = read_manifest(str(manifest))
    assert {r.class_name for r in records} == {"a", "b"}
    assert {r.split for r in records} == {"train", "test"}
    again = tmp_path / "again"
    assert ardiff("prepare", "--source", source, "--output", again, "test_fraction=0.3").code == 0
    assert [r.split for r in read_manifest(str(again / "manifest.parquet"))] == [r.split for r in records]
    save_autoencoder(str(tmp_path / "vae"), make_vae())
    settings = ["num_frames=6", "clip_step=3", "batch_size=4"]
    crowd = ["min_actors=64", "max_actors=64", "device=cpu"]
    outcome = ardiff(
        "encode", "--manifest", manifest, "--vae", tmp_path / "vae", "--output", tmp_path / "z", *settings, *crowd
    )
    assert outcome.code == 2
    assert "min_actors=64 needs as many CPUs and one to decode with" in outcome.complaint
    outcome = ardiff(
        "encode", "--manifest", manifest, "--vae", tmp_path / "vae", "--output", tmp_path / "latents", *settings
    )
    assert outcome.code == 0, outcome.err
    assert f"{3 * sum(r.split == 'train' for r in records)} clips encoded, 0 were there" in outcome.err
    [description] = (tmp_path / "latents").glob("*/latents.json")
    assert outcome.err.splitlines()[-1] == f"Latents: {description.parent}"  # what training is to be given


def test_a_set_of_latents_follows_labels_and_splits(
    ardiff: Command, cluster: None, make_vae: Any, tmp_path: Path
) -> None:
    """A new class that sorts first shifts the labels of the others, and a video moves to the test split."""
    from ardiff.pretrained import save_autoencoder

    source = put(tmp_path / "own", {f"{i}.mp4": video(seed=i) for i in range(4)})
    save_autoencoder(str(tmp_path / "vae"), make_vae())
    manifest, output = str(tmp_path / "manifest.parquet"), tmp_path / "latents"
    command = ["encode", "--manifest", manifest, "--vae", tmp_path / "vae", "--output", output, "num_frames=8"]

    def encode(classes: dict[int, str], *tests: int) -> dict[str, int]:
        names = sorted(set(classes.values()))
        rows = [(record(f"{source}/{i}.mp4", 12, "test" if i in tests else "train"), c) for i, c in classes.items()]
        rows.append((record("short.mp4", 7), names[0]))
        write_manifest(manifest, [replace(r, class_name=c, label=names.index(c)) for r, c in rows])
        outcome = ardiff(*command)
        assert outcome.code == 0, outcome.err
        assert "1 videos are too short for a clip" in outcome.err
        assert [(r.uri, r.error) for r in read_errors(f"{output}/errors.parquet")] == [("short.mp4", "too short")]
        [place] = output.rglob("latents.json")
        description = read_description(str(place.parent))
        assert description.class_names == names
        tables = [read_labelled_keys(f"{place.parent}/{file}") for file in description.files]
        return {Path(row["uri"]).stem: row["label"] for table in tables for row in table.to_pylist()}

    assert encode({0: "cats", 1: "dogs", 2: "dogs"}) == {"0": 0, "1": 1, "2": 1}
    assert encode({0: "cats", 1: "dogs", 2: "dogs", 3: "apes"}, 2) == {"0": 1, "1": 2, "3": 0}
    assert encode({0: "cats", 1: "dogs", 2: "eels", 3: "apes"}, 2) == {"0": 1, "1": 2, "3": 0}
    assert encode({0: "cats", 3: "bats"}) == {"0": 1, "3": 0}


@pytest.mark.slow
def test_videos_that_end_their_process_become_rows(
    ardiff: Command, cluster: None, make_vae: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of six videos kill every process that reads them; the other four are used."""
    from ardiff.pretrained import save_autoencoder
    from ray_jobs import encode, prepare

    def deadly(function: Any, position: int) -> Any:
        def call(*arguments: Any) -> Any:
            if arguments[position].uri.endswith(("1.mp4", "3.mp4")):
                os.kill(os.getpid(), signal.SIGSEGV)
            return function(*arguments)

        return call

    source = put(tmp_path / "own", {f"{i}.mp4": video(seed=i) for i in range(6)})
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "probe_record", deadly(prepare.probe_record, 0))
        outcome = ardiff("prepare", source, tmp_path / "data")
    assert outcome.code == 0, outcome.err
    bad = [f"{source}/1.mp4", f"{source}/3.mp4"]
    errors = read_errors(str(tmp_path / "data" / "errors.parquet"))
    assert [(row.uri, row.error, row.attempts) for row in errors] == [(uri, "crashed", 2) for uri in bad]
    statuses = [r.status for r in read_manifest(f"{tmp_path}/data/manifest.parquet")]
    assert statuses == ["ok", "error", "ok", "error", "ok", "ok"]
    assert ardiff("prepare", source, tmp_path / "data").code == 0  # what ended processes is tried again
    assert read_errors(str(tmp_path / "data" / "errors.parquet")) == []

    save_autoencoder(str(tmp_path / "vae"), make_vae())
    command = ["encode", f"manifest={tmp_path}/data/manifest.parquet", f"vae={tmp_path}/vae"]
    command += [f"output={tmp_path}/latents", "max_bad_fraction=0.5"]
    with monkeypatch.context() as patch:
        patch.setattr(encode, "_decode", deadly(encode._decode, 2))
        outcome = ardiff(*command, "num_frames=4", "clip_step=4")
    assert outcome.code == 0, outcome.err
    errors = read_errors(str(tmp_path / "latents" / "errors.parquet"))
    assert {(row.uri, row.clip, row.error) for row in errors} == {(u, s, "crashed") for u in bad for s in (0, 4, 8)}
    [place] = (tmp_path / "latents").rglob("latents.json")
    assert sum(read_description(str(place.parent)).rows) == 9
