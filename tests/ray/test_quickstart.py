"""A small quickstart: what it prints, and what it leaves in its folder."""

import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from jobs import Jobs, Result
from text_encoders import WIDTH, write_encoder

from ardiff.data.config import SyntheticConfig
from ardiff.data.decode import decode_clip
from ardiff.data.encode import encode_video
from ardiff.data.latents import read_description, read_latents
from ardiff.data.manifest import class_names, read_manifest
from ardiff.data.probe import probe
from ardiff.data.synthetic import CLASSES, DIRECTIONS, SIZES, SPEEDS, render_video
from ardiff.data.synthetic_captions import COLOUR_NAMES, WORDINGS, asks_for_held_out
from ardiff.metrics.controls import CONTROLS
from ardiff.metrics.pairs.psnr import psnr
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.resolution import Resolution

pytestmark = pytest.mark.ray

Command = Callable[..., Result]

STAGES = {
    "data": "prepare",
    "vae": "train-vae",
    "latents": "encode",
    "dit": "train-dit",
    "samples": "generate",
    "scores": "evaluate",
}
TINY = shlex.split("""
prepare.synthetic.num_train=24 prepare.synthetic.num_test=16 prepare.synthetic.num_frames=24
prepare.synthetic.num_long=2 prepare.synthetic.long_frames=40
train_vae.train.num_steps=12 train_vae.train.checkpoint_every=6 train_vae.train.sample_every=12
train_vae.train.log_every=4 train_vae.task.temporal_from_step=8 train_vae.vae.width=32 train_vae.vae.depth=1
encode.batch_size=16 encode.clip_step=8
train_dit.train.num_steps=12 train_dit.train.checkpoint_every=6 train_dit.train.sample_every=12
train_dit.train.log_every=4 train_dit.train.batch_size=8 train_dit.dit.width=32 train_dit.dit.depth=1
generate.num_videos=8 generate.num_inference_steps=4 evaluate.num_clips=8 evaluate.batch_size=4
samples.ar_steps=[0,2,4] samples.num_long=2 samples.long_frames=24 samples.long_ar_step=2
""")
# Starting processes takes most of the time: one actor per stage and one set of videos are enough.
TINIEST = shlex.split("""
train_vae.train.sample_every=0 train_dit.train.sample_every=0 generate.max_actors=1 samples.ar_steps=[2]
evaluate.max_actors=1 evaluate.controls=false evaluate.i3d_clips=0
""")


@pytest.fixture(scope="module")
def finished(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The folder and the output of a run in a process of its own."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    jobs.environment["RAY_DATA_STARVATION_WARNING_DELAY_S"] = "3600"  # a busy machine is no reason to warn
    result = jobs.run("quickstart", "--fast", "--output", str(folder), *TINY)
    assert result.code == 0, result.err
    return folder, result


def test_every_stage_is_recorded(finished: tuple[Path, Result]) -> None:
    folder, _ = finished
    for place, name in STAGES.items():
        record = json.loads((folder / place / "stage.json").read_text())
        assert record["name"] == name
        assert record["seconds"] > 0
        assert 100 < record["peak_mib"] < 6 * 1024 * max(1, (os.cpu_count() or 1) / 4)  # Ray has a process for each


def test_terminal_shows_one_line_per_stage_and_no_warnings(finished: tuple[Path, Result]) -> None:
    folder, result = finished
    done = re.findall(r"^✓ (.*?): [0-9.]+ s, [0-9]+ MiB\. ", result.err, flags=re.MULTILINE)
    assert done == list(STAGES.values())
    assert result.err.rstrip().splitlines()[-1] == str(folder / "report.html")
    for noise in ("WARNING", "Warning", "Traceback", "Token authentication", "Progress bars disabled", "SaveMode"):
        assert noise not in result.err
    assert result.out == ""


def test_configuration_and_versions_are_recorded(finished: tuple[Path, Result]) -> None:
    folder, _ = finished
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["train_dit"]["dit"]["width"] == 32
    assert config["samples"]["ar_steps"] == [0, 2, 4]
    versions = json.loads((folder / "versions.json").read_text())
    assert {"python", "torch", "ray", "git", "ardiff"} <= versions.keys()
    for place in ("vae", "dit", "samples/long", "scores"):
        assert (folder / place / "config.yaml").is_file()
        assert (folder / place / "versions.json").is_file()
    latents = json.loads((folder / "latents" / "stage.json").read_text())["results"]["folder"]
    assert yaml.safe_load((Path(latents) / "config.yaml").read_text())["batch_size"] == 16


def test_manifest_lists_the_synthetic_set(finished: tuple[Path, Result]) -> None:
    records = read_manifest(str(finished[0] / "data" / "manifest.parquet"))
    assert [r.split for r in records] == ["train"] * 24 + ["test"] * 16
    assert class_names(records) == ["ring", "square", "triangle", "plus"]
    assert [r.num_frames for r in records] == [40, 40] + [24] * 38
    for record in records[::7]:
        assert probe(Path(record.uri).read_bytes()).num_frames == record.num_frames


def test_latents_are_complete_and_described(finished: tuple[Path, Result]) -> None:
    folder = json.loads((finished[0] / "latents" / "stage.json").read_text())["results"]["folder"]
    description = read_description(folder)
    # Clips start every 8 frames: 2 in each of 22 videos of 24 frames, 4 in each of 2 of 40.
    assert sum(description.rows) == 22 * 2 + 2 * 4
    parts = [read_latents(f"{folder}/{file}", (16, 1, 8)) for file in description.files]
    assert [len(latents) for latents, _ in parts] == description.rows
    latents = np.concatenate([latents for latents, _ in parts])
    assert np.isfinite(latents).all()
    np.testing.assert_allclose(latents.mean(axis=(0, 1)), description.statistics.mean, atol=1e-5)
    assert {int(label) for _, labels in parts for label in labels} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("place", "count", "frames"),
    [("samples/ar-step-0", 8, 16), ("samples/ar-step-2", 8, 16), ("samples/ar-step-4", 8, 16), ("samples/long", 2, 24)],
)
def test_generated_videos_decode(finished: tuple[Path, Result], place: str, count: int, frames: int) -> None:
    folder = finished[0] / place
    records = read_manifest(str(folder / "manifest.parquet"))
    assert [r.uri for r in records] == [str(folder / "videos" / f"{i:05d}.mp4") for i in range(count)]
    for record in records:
        found = probe(Path(record.uri).read_bytes())
        assert (found.codec, found.num_frames, found.height, found.width) == ("h264", frames, 32, 32)
    assert [r.label for r in records] == [i % 4 for i in range(count)]
    assert (folder / "sheet.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("place", "frames", "ar_step"), [("samples/ar-step-2", 16, 2), ("samples/long", 24, 2)])
def test_the_pipeline_alone_gives_the_same_video(
    finished: tuple[Path, Result], place: str, frames: int, ar_step: int
) -> None:
    pipeline = ARDiffusionPipeline.from_pretrained(str(finished[0] / "dit" / "pipeline"))
    assert pipeline.class_names == ["ring", "square", "triangle", "plus"]
    video = pipeline(class_label=1, num_frames=frames, ar_step=ar_step, num_inference_steps=4, seed=1).frames.numpy()[0]
    stored = (finished[0] / place / "videos" / "00001.mp4").read_bytes()
    # Both through the codec: 4:2:0 video cannot store the coloured noise of an untrained model.
    through = decode_clip(encode_video(video, 8.0, crf=8), 0, frames)
    assert psnr(through, decode_clip(stored, 0, frames)) > 40


def test_scores_hold_every_set(finished: tuple[Path, Result]) -> None:
    scores = json.loads((finished[0] / "scores" / "scores.json").read_text())
    by_class = pd.read_csv(finished[0] / "scores" / "by_condition.csv")
    assert set(by_class["condition"]) <= set(CLASSES)
    means = by_class.groupby("set").apply(lambda rows: np.average(rows["frame identity"], weights=rows["videos"]))
    assert means["real"] == pytest.approx(scores["sets"]["real"]["frame identity"])
    sets = scores["sets"]
    assert sets.keys() == {"real", "reconstruction", "ar-step-0", "ar-step-2", "ar-step-4", *CONTROLS}
    assert all(np.isfinite(values["distance"]) for values in sets.values())
    assert sets["real"]["distance"] < sets["shuffled frames"]["distance"] < sets["noise"]["distance"]
    assert sets["real"]["frame identity"] == sets["real"]["neighbours alike"] == 1.0
    assert sets["identity flicker"]["frame identity"] < 1.0
    rows = {score["set"]: score for score in scores["scores"] if score["metric"] == "distance"}
    assert rows.keys() == sets.keys()
    assert rows["ar-step-2"]["protocol"]["num_real"] == rows["ar-step-2"]["protocol"]["num_fake"] == 8
    assert rows["ar-step-2"]["baseline"] == sets["real"]["distance"]
    assert rows["ar-step-2"]["low"] < sets["ar-step-2"]["distance"] < rows["ar-step-2"]["high"]
    assert (finished[0] / "scores" / "scores.parquet").exists()
    assert "95 % interval" in (finished[0] / "report.html").read_text()


def test_report_is_self_contained(finished: tuple[Path, Result]) -> None:
    page = (finished[0] / "report.html").read_text()
    assert "AR-Diffusion quickstart" in page
    loaded = re.findall(r"""(?:\bsrc|\bhref|\bposter|\bdata)\s*=\s*["']([^"']+)""", page)
    assert loaded
    assert all(place.startswith(("data:", "#")) for place in loaded), [p[:80] for p in loaded if p[:5] != "data:"]
    assert not re.search(r"@import|url\(\s*[\"']?(?!data:|#)", page)
    assert page.count("data:video/mp4") == 5  # real clips, three short sets, the long one


def test_a_second_run_does_nothing(ardiff: Command, cluster: None, finished: tuple[Path, Result]) -> None:
    folder, _ = finished
    before = _snapshot(folder, leave_out="report.html")
    err = ardiff("quickstart", "--fast", "--output", folder, *TINY).expect(0)
    assert re.findall(r"^✓ (.*): done before\.", err, flags=re.MULTILINE) == list(STAGES.values())
    assert _snapshot(folder, leave_out="report.html") == before


def test_another_setting_in_the_same_folder_is_refused(
    ardiff: Command, cluster: None, finished: tuple[Path, Result]
) -> None:
    folder, _ = finished
    before = _snapshot(folder)
    result = ardiff("quickstart", "--fast", "--output", folder, *TINY, "train_dit.dit.width=64")
    assert result.code == 2
    assert "another configuration" in result.complaint
    assert f"{folder}/dit" in result.complaint
    assert _snapshot(folder) == before


@pytest.mark.slow
def test_videos_of_ones_own(ardiff: Command, cluster: None, tmp_path: Path) -> None:
    videos, folder = tmp_path / "videos", tmp_path / "run"
    sizes = SyntheticConfig(resolution=Resolution.square(48), radius=10.0, num_frames=24, num_long=0)
    for index in range(24):  # rings and squares of 60 x 48 pixels, one folder a class
        square = render_video(sizes, index // 2 * 4 + index % 2, "train")
        place = videos / ("ring", "square")[index % 2] / f"{index}.mp4"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encode_video(np.pad(square, ((0, 0), (0, 0), (6, 6), (0, 0)), mode="edge"), 12.0, crf=8))
    (videos / "ring" / "broken.mp4").write_bytes(b"no video")
    err = ardiff("quickstart", "--output", folder, "--data", videos, *TINY, *TINIEST).expect(0)
    assert "broken.mp4" in err
    records = read_manifest(str(folder / "data" / "manifest.parquet"))
    assert sorted({r.uri for r in records}) == sorted(str(p) for p in videos.rglob("*.mp4"))
    good = [r for r in records if r.status == "ok"]
    assert {(r.width, r.height, r.class_name) for r in good} == {(60, 48, "ring"), (60, 48, "square")}
    assert {r.split for r in good} == {"train", "test"}
    assert not (folder / "data" / "train").exists(), "nothing is drawn or copied"
    assert ARDiffusionPipeline.from_pretrained(str(folder / "dit" / "pipeline")).class_names == ["ring", "square"]
    sets = json.loads((folder / "scores" / "scores.json").read_text())["sets"]
    assert np.isfinite(sets["ar-step-2"]["distance"])
    assert "frame identity" not in sets["real"], "these are not known to be the synthetic shapes"
    assert "data:video/mp4" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_a_model_that_takes_prompts(ardiff: Command, cluster: None, tmp_path: Path) -> None:
    words = sorted({word for wording in WORDINGS for word in re.sub(r"{.*?}|,", " ", wording).split()})
    words += [*CLASSES, *COLOUR_NAMES, *SIZES, *SPEEDS, *" ".join(DIRECTIONS).split()]
    folder, encoder = tmp_path / "run", write_encoder(tmp_path / "encoder", words=list(dict.fromkeys(words)))
    settings = [f"encode.text.encoder={encoder}", f"train_dit.dit.condition_dim={WIDTH}"]
    ardiff("quickstart", "--text", "--fast", "--output", folder, *TINY, *TINIEST, *settings).expect(0)
    prompts = {name: (folder / "prompts" / f"{name}.txt").read_text().splitlines() for name in ("test", "held-out")}
    assert [len(lines) for lines in prompts.values()] == [8, 8]
    assert [asks_for_held_out(line) for lines in prompts.values() for line in lines] == [False] * 8 + [True] * 8
    for name, lines in (("ar-step-2", prompts["test"]), ("ar-step-2-held-out", prompts["held-out"])):
        records = read_manifest(str(folder / "samples" / name / "manifest.parquet"))
        assert [record.captions for record in records] == [(line,) for line in lines]
    sets = json.loads((folder / "scores" / "scores.json").read_text())["sets"]
    assert sets["real"]["prompt followed"] == sets["real"]["prompt direction"] == 1.0
    assert 0.0 <= sets["ar-step-2-held-out"]["prompt followed"] <= 1.0
    by_prompt = pd.read_csv(folder / "scores" / "by_condition.csv")
    assert set(by_prompt.loc[by_prompt["set"] == "ar-step-2", "condition"]) == set(prompts["test"])
    assert "Prompts or classes that are followed least" in (folder / "report.html").read_text()
    pipeline = ARDiffusionPipeline.from_pretrained(str(folder / "dit" / "pipeline"))
    video = pipeline(prompt=prompts["test"][1], ar_step=2, num_inference_steps=4, guidance_scale=1.5, seed=1).frames
    stored = (folder / "samples" / "ar-step-2" / "videos" / "00001.mp4").read_bytes()
    assert psnr(decode_clip(encode_video(video.numpy()[0], 8.0, crf=8), 0, 16), decode_clip(stored, 0, 16)) > 40
    assert prompts["held-out"][0] in (folder / "report.html").read_text()


def _snapshot(folder: Path, leave_out: str = "") -> dict[str, tuple[int, bytes]]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != leave_out)
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}
