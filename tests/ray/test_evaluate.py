"""Evaluations of small videos: every protocol end to end, with weights made by a rule, and errors."""

import functools
import hashlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from jobs import Jobs
from PIL import Image
from safetensors.torch import save_file

from ardiff.cli import main
from ardiff.data import storage
from ardiff.data.decode import decode_clip
from ardiff.data.encode import encode_video
from ardiff.data.manifest import VideoRecord, write_manifest
from ardiff.errors import ArdiffError
from ardiff.metrics.frechet import frechet_distance, kernel_distance
from ardiff.metrics.networks.lpips import LPIPS
from ardiff.metrics.pairs.psnr import frame_psnr
from ardiff.metrics.scores import SetScore, read_scores
from ardiff.metrics.store import ClipFeatures, FeatureStore
from ardiff.metrics.weights import fetch
from ardiff.pretrained import save_autoencoder
from ardiff.vae import ARAutoencoder
from ray_jobs.evaluation.datasets import Clip
from ray_jobs.evaluation.features import ClipSet, Workers, extract
from ray_jobs.evaluation.reconstruction import reconstruct

pytestmark = pytest.mark.ray

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics"
FIXTURES = {"i3d": "i3d", "resnet3d": "resnet3d50", "inception": "inception_v3_fid"}
SIZE = 32


ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A file of rule-filled weights per network."""
    spec = importlib.util.spec_from_file_location("fill_rules", GOLDEN / "fill.py")
    assert spec is not None
    assert spec.loader is not None
    rules = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rules)
    folder, expected = tmp_path_factory.mktemp("weights"), json.loads((GOLDEN / "net_fixtures.json").read_text())
    files = {}
    for name, fixture in FIXTURES.items():
        arrays = rules.fill(expected[fixture]["state_shapes"], expected[fixture]["seed"])
        state = {key: torch.from_numpy(array) for key, array in arrays.items()}
        files[name] = str(folder / name)
        torch.save({"state_dict": state}, files[name])
    model, generator = LPIPS("alex"), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.rand(parameter.shape, generator=generator) * 0.02
    files["lpips"] = str(folder / "lpips.safetensors")
    save_file(model.state_dict(), files["lpips"])
    return files


def video(seed: int, frames: int, size: int = SIZE, noise: float = 0.0) -> np.ndarray:
    """Colours that drift over a smooth background, plus ``noise``."""
    generator = np.random.default_rng(seed)
    ground = generator.normal(size=(4, 4, 3)).repeat(size // 4, 0).repeat(size // 4, 1) * 40 + 128
    way = generator.normal(size=(frames, 1, 1, 3)).cumsum(0) * 3
    grains = np.random.default_rng(seed + 10_000).normal(size=(frames, size, size, 3)) * noise
    return (ground + way + grains).clip(0, 255).astype(np.uint8)


def put(folder: Path, count: int, first: int = 0, frames: int = 16, **kwargs: Any) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"{i:03d}.mp4").write_bytes(encode_video(video(first + i, frames, **kwargs), 8.0, crf=4))
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of 16-frame videos: 8 real ones, 4 other ones, and the first 4 real ones with noise."""
    folder = tmp_path_factory.mktemp("videos")
    put(folder / "real", 8)
    put(folder / "other", 4, first=100)
    put(folder / "noisy", 4, noise=30.0)
    return folder


@pytest.fixture
def evaluate(cluster: None, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """``evaluate(real, fake, ...)``: the exit code and the error output."""

    def run(real: object, *arguments: object) -> tuple[int, str]:
        capfd.readouterr()
        settings = ["--num-clips", "4", "--batch-size", "2", "--cache", tmp_path / "cache", "--partitions", "4"]
        code = main(["evaluate", "--real", str(real), *map(str, settings), *map(str, arguments)])
        return code, capfd.readouterr().err

    return run


Evaluate = Callable[..., tuple[int, str]]


def by_metric(folder: Path) -> dict[tuple[str, str], SetScore]:
    return {(score.set, score.metric): score for score in read_scores(str(folder))}


# The heavy networks once each: 4 + 4 + 4 clips of 16 small frames.


def test_styleganv_end_to_end(
    evaluate: Evaluate, videos: Path, weights: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of videos, FVD and KVD from the same features. A second run needs neither features nor a cluster."""
    arguments = ["--fake", videos / "other", "--metrics", "fvd,kvd", "--weights", weights["i3d"]]
    code, said = evaluate(videos / "real", *arguments, "--output", tmp_path / "a")
    assert code == 0, said
    scores = by_metric(tmp_path / "a")
    fvd, kvd = scores["other", "fvd"], scores["other", "kvd"]
    real = FeatureStore(str(next((tmp_path / "cache" / "features").iterdir()))).read(8)[0].array()[:, 0]
    fake = FeatureStore(str(next((tmp_path / "a" / "features").iterdir()))).read(4)[0].array()[:, 0]
    assert fvd.score == pytest.approx(frechet_distance(real[:4], fake, ddof=0), rel=1e-12)
    assert kvd.score == pytest.approx(kernel_distance(real[:4], fake), rel=1e-12)
    assert (fvd.baseline, fvd.baseline_num) == (pytest.approx(frechet_distance(real[:4], real[4:], ddof=0)), 4)
    assert fvd.low is None
    assert fvd.notes[0] == "There is no interval: it needs 8 videos."
    assert fvd.notes[1].startswith("4 videos are fewer than the 400 features.")
    assert (fvd.checks and (fvd.checks.num_clips, fvd.checks.duplicates, fvd.checks.copies)) == (0, 0, 0)
    p = fvd.protocol
    assert p.choice == "drawn with seed 0, balanced over classes"
    assert (p.name, p.metric, p.network, p.num_frames, p.ddof) == ("styleganv", "fvd", "i3d", 16, 0)
    assert (p.resolution, p.codec_real, p.codec_fake, p.real_split) == ("32x32", "h264", "h264", "folder")
    assert (p.num_real, p.num_fake, p.resize) == (4, 4, "bilinear to 224x224")
    assert len(p.weights) == 64
    assert "real vs real" in said
    versions = json.loads((tmp_path / "a" / "scores.json").read_text())["versions"]
    assert {"torch", "ray", "git"} <= versions.keys()

    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").rglob("*.parquet")}

    def fail() -> None:
        raise AssertionError("the cluster was used again")

    monkeypatch.setattr("ray_jobs.evaluate.ray_cluster", fail)
    for _ in range(2):  # the scores of this run are read, then computed from the features
        code, said = evaluate(videos / "real", *arguments, "--output", tmp_path / "a")
        assert code == 0
        assert "i3d: " not in said  # neither real nor generated clips went through the network again
        assert by_metric(tmp_path / "a") == scores
        shutil.rmtree(tmp_path / "a" / "scores")
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").rglob("*.parquet")} == before


@pytest.mark.slow
def test_ardiff_release_end_to_end(evaluate: Evaluate, videos: Path, weights: dict[str, str], tmp_path: Path) -> None:
    """FID-vid and FID-img with both sides re-encoded, on a manifest with splits."""
    files = sorted((videos / "real").iterdir())
    records = [
        VideoRecord(str(f), 1, "h264", SIZE, SIZE, 8.0, 16, 0, "video", "train" if i < 6 else "test", "ok", "")
        for i, f in enumerate(files)
    ]
    write_manifest(str(tmp_path / "manifest.parquet"), records)
    code, said = evaluate(
        tmp_path / "manifest.parquet", "--split", "train", "--protocol", "ardiff-release", "--num-clips", 2,
        "--fake", f"{videos / 'other'},{videos / 'noisy'}", "--metrics", "fid-vid,fid-img", "--partitions", 0,
        "--weights", f"{weights['resnet3d']},{weights['inception']}", "--output", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, said
    scores = by_metric(tmp_path / "out")
    assert set(scores) == {(s, m) for s in ("other", "noisy") for m in ("fid-vid", "fid-img")}
    vid, img = scores["noisy", "fid-vid"], scores["noisy", "fid-img"]
    assert img.score > scores["other", "fid-img"].score * 0.1
    assert vid.protocol.codec_real == vid.protocol.codec_fake == "h264, then mpeg4 at 25 fps"
    assert (vid.protocol.real_split, vid.protocol.ddof, vid.baseline_num) == ("train", 1, 2)
    assert vid.protocol.resize == "bicubic-antialias to 112x112"
    assert (vid.low, vid.high, vid.infinity) == (None, None, None)
    stores = {f.name.split("-")[0]: FeatureStore(str(f)) for f in (tmp_path / "cache" / "features").iterdir()}
    assert stores["inception"].read(4)[0].array().shape == (4, 16, 2048)
    assert stores["resnet3d"].read(4)[0].array().shape == (4, 1, 2048)
    rows = pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    assert len(rows) == 4


def test_pairs_end_to_end(evaluate: Evaluate, videos: Path, weights: dict[str, str], tmp_path: Path) -> None:
    """Reconstructions against originals of the same names. Copies of the originals have perfect scores."""
    (tmp_path / "same").mkdir()
    for file in (videos / "noisy").iterdir():
        shutil.copy(videos / "real" / file.name, tmp_path / "same")
    code, said = evaluate(
        videos / "real", "--fake", f"{videos / 'noisy'},{tmp_path / 'same'}", "--metrics", "psnr,ssim,lpips",
        "--weights", weights["lpips"], "--output", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, said
    scores = by_metric(tmp_path / "out")
    assert [round(scores["same", m].score, 6) for m in ("psnr", "ssim", "lpips")] == [100.0, 1.0, 0.0]
    assert 15 < scores["noisy", "psnr"].score < 25
    assert 0 < scores["noisy", "ssim"].score < 0.9
    assert scores["noisy", "lpips"].score > 0
    assert scores["noisy", "psnr"].protocol.real_data == scores["same", "psnr"].protocol.real_data
    assert scores["noisy", "psnr"].fake_data != scores["same", "psnr"].fake_data
    assert scores["noisy", "psnr"].baseline is None


def test_content_debiased_fvd_end_to_end(evaluate: Evaluate, videos: Path, tmp_path: Path) -> None:
    """By the network of a model folder, whose configuration travels to the actors with its weights."""
    import transformers

    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.VideoMAEConfig(patch_size=32, **sizes)
    torch.manual_seed(0)
    transformers.VideoMAEForVideoClassification(config).save_pretrained(tmp_path / "videomae")
    arguments = ["--fake", videos / "noisy", "--protocol", "cd-fvd", "--output", tmp_path / "out"]
    code, said = evaluate(videos / "real", *arguments, "--metrics", "cd-fvd", "--weights", tmp_path / "videomae")
    assert code == 0, said
    score = by_metric(tmp_path / "out")["noisy", "cd-fvd"]
    p = score.protocol
    assert (p.name, p.network, p.resize, p.value_range) == ("cd-fvd", "videomae", "bilinear to 224x224", "[0, 1]")
    fake = FeatureStore(str(next((tmp_path / "out" / "features").iterdir()))).read(4)[0].array()
    assert fake.shape == (4, 1, 24)
    assert score.score > 0
    code, said = evaluate(videos / "real", *arguments, "--weights", tmp_path / "videomae")
    assert code == 2
    assert "cd-fvd does not define fvd: use styleganv or ardiff-release, or one of its metrics, cd-fvd" in said


def test_temporal_consistency_needs_no_weights(evaluate: Evaluate, tmp_path: Path) -> None:
    """A shuffled copy of the real videos changes more from frame to frame than other real videos do."""
    real, fake = put(tmp_path / "real", 16), tmp_path / "shuffled"
    fake.mkdir()
    for number, file in enumerate(sorted(real.iterdir())[:8]):
        order = np.random.default_rng(number).permutation(16)
        (fake / file.name).write_bytes(encode_video(video(number, 16)[order], 8.0, crf=8))
    metrics = "frame-difference,frame-second-difference"
    code, said = evaluate(real, "--fake", fake, "--metrics", metrics, "--num-clips", 8, "--output", tmp_path / "out")
    assert code == 0, said
    scores = by_metric(tmp_path / "out")
    for metric in metrics.split(","):
        score = scores["shuffled", metric]
        assert score.low is not None
        assert score.score > 1.5 > (score.baseline or 0.0) > 0.5
        assert (score.baseline_num, score.infinity, score.protocol.network) == (8, None, "random-frames")
    assert "frame-difference (styleganv: random-frames" in said


@pytest.mark.slow
def test_drift_end_to_end(evaluate: Evaluate, weights: dict[str, str], tmp_path: Path) -> None:
    fake = put(tmp_path / "long", 2, first=50, frames=32)
    real = put(tmp_path / "real", 2, first=70, frames=32)
    for file in fake.iterdir():  # psnr needs originals
        shutil.copy(file, real / file.name)
    code, said = evaluate(
        real, "--fake", fake, "--metrics", "psnr", "--frames", 32, "--num-clips", 2, "--partitions", 0,
        "--drift", "--shapes", "--weights", weights["i3d"], "--output", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, said
    drift = json.loads((tmp_path / "out" / "drift.json").read_text())
    assert [len(s["fvd"]) for s in drift["sets"]] == [2]
    assert drift["sets"][0]["fvd"][0] != drift["sets"][0]["fvd"][1]
    assert drift["sets"][0]["colour"][0] == 0.0 < drift["sets"][0]["colour"][1]
    assert drift["sets"][0]["statistics"]["frame identity"] == [0.0, 0.0], "these videos show no shape"
    error = drift["sets"][0]["error"]["brightness"]
    assert error == drift["real_error"]["brightness"], "the real videos are copies"
    first, second = drift["sets"][0]["statistics"]["brightness"]
    assert error["mean"] >= abs(second - first) / first * 0.9
    assert (tmp_path / "out" / "drift.png").read_bytes().startswith(b"\x89PNG")
    assert "Drift over long videos" in (tmp_path / "out" / "drift.html").read_text()


@pytest.mark.slow
def test_the_other_metric_of_each_protocol(
    evaluate: Evaluate, videos: Path, weights: dict[str, str], tmp_path: Path
) -> None:
    for protocol, metric, network in (("styleganv", "fid-img", "inception"), ("ardiff-release", "fvd", "i3d")):
        code, said = evaluate(
            videos / "real", "--fake", videos / "noisy", "--protocol", protocol, "--metrics", metric,
            "--partitions", 0, "--weights", weights[network], "--output", tmp_path / protocol,
        )  # fmt: skip
        assert code == 0, said
        [score] = read_scores(str(tmp_path / protocol))
        assert (score.protocol.name, score.metric, score.protocol.network) == (protocol, metric, network)
        assert score.score > 0
        assert score.baseline is not None


@pytest.mark.slow
def test_long_videos_on_s3(jobs: Jobs, s3_bucket: str, weights: dict[str, str]) -> None:
    """128-frame videos on an S3 server, which also gets scores, features and drift."""
    weight = f"{s3_bucket}/i3d"
    storage.write_bytes(weight, Path(weights["i3d"]).read_bytes())
    for name, first in (("real", 0), ("fake", 40)):
        for i in range(2):
            clip = video(first + i, 128)
            if name == "fake":  # brighter with every frame
                clip = (clip + np.arange(128)[:, None, None, None] * 0.7).clip(0, 255).astype(np.uint8)
            storage.write_bytes(f"{s3_bucket}/{name}/{i}.mp4", encode_video(clip, 8.0, crf=4))
    jobs.environment |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    result = jobs.run(
        "evaluate", "--real", f"{s3_bucket}/real", "--fake", f"{s3_bucket}/fake", "--frames", "128", "--num-clips", "2",
        "--partitions", "0", "--batch-size", "2", "--drift", "--cache", f"{s3_bucket}/cache", "--weights", weight,
        "--output", f"{s3_bucket}/scores",
    )  # fmt: skip
    assert result.code == 0, result.err
    [score] = read_scores(f"{s3_bucket}/scores")
    assert (score.protocol.num_frames, score.set, score.metric) == (128, "fake", "fvd")
    drift = json.loads(storage.read_bytes(f"{s3_bucket}/scores/drift.json"))
    [fake] = drift["sets"]
    assert len(fake["fvd"]) == 8
    assert fake["fvd"][-1] > 2 * fake["fvd"][0]
    assert storage.read_bytes(f"{s3_bucket}/scores/drift.png").startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_quick_evaluation_has_fvd_if_the_weights_are_in_the_cache(
    cluster: None, videos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("real", "other"):
        files = sorted((videos / name).iterdir())[:4]
        records = [VideoRecord(str(f), 1, "h264", SIZE, SIZE, 8.0, 16, 0, "v", "test", "ok", "") for f in files]
        write_manifest(str(tmp_path / name / "manifest.parquet"), records)
    command = ["evaluate-quick", "--real", str(tmp_path / "real" / "manifest.parquet")]
    command += ["--fake", str(tmp_path / "other" / "manifest.parquet"), "--num-clips", "2", "--batch-size", "2"]
    assert main([*command, "controls=false", "--output", str(tmp_path / "without")]) == 0
    scores = json.loads((tmp_path / "without" / "scores.json").read_text())
    assert scores["extractors"] == {"distance": "random3d-seed0-v2"}
    assert "fvd" not in scores["sets"]["other"]

    monkeypatch.setenv("ARDIFF_CACHE", str(tmp_path / "cache"))
    try:
        fetch("i3d")
    except ArdiffError as error:
        pytest.skip(f"THE REAL WEIGHTS ARE NOT TESTED: {error}")
    capfd.readouterr()
    assert main([*command, "--output", str(tmp_path / "with")]) == 0
    said = capfd.readouterr().err
    assert "fvd (quick: i3d d8922d739a2a" in said
    assert "2 real (test) and 2 generated clips)" in said
    scores = json.loads((tmp_path / "with" / "scores.json").read_text())
    assert scores["extractors"]["fvd"] == "i3d, Kinetics-400, 2 clips a set"
    assert {name for name, values in scores["sets"].items() if "fvd" in values} == {"real", "other", "shuffled frames"}
    assert all(values["fvd"] > 0 for values in scores["sets"].values() if "fvd" in values)


# Extraction with a cheap measure


@pytest.mark.parametrize("command", ["evaluate", "evaluate-quick"])
def test_folders_of_pictures_are_scored(cluster: None, tmp_path: Path, command: str) -> None:
    """From a manifest and from a folder, beside video files of the same pictures."""
    put(tmp_path / "files", 8)
    for place in ("real/test", "fake"):
        for i in range(8):
            (tmp_path / place / f"{i:03d}").mkdir(parents=True)
            for number, picture in enumerate(video(i, 16)):
                Image.fromarray(picture).save(tmp_path / place / f"{i:03d}" / f"{number}.png")
    assert main(["prepare", str(tmp_path / "real"), str(tmp_path / "data")]) == 0
    settings = ["--real", f"{tmp_path}/data/manifest.parquet", f"fake=[{tmp_path}/fake,{tmp_path}/files]"]
    settings += ["--num-clips", "4", "--batch-size", "2", "--output", f"{tmp_path}/out"]
    assert main([command, *settings] if command == "evaluate-quick" else [command, *settings, "--metrics", "psnr"]) == 0
    if command == "evaluate-quick":
        scores = json.loads((tmp_path / "out" / "scores.json").read_text())["sets"]
        assert scores["fake"]["distance"] < scores["shuffled frames"]["distance"]
    else:
        scores = by_metric(tmp_path / "out")
        assert scores["fake", "psnr"].score > 60 > scores["files", "psnr"].score
        assert scores["fake", "psnr"].protocol.codec_real == "png"


class Means:
    """Mean of each channel and deviation of the first frame. Without the marker file, kills its process once."""

    def __init__(self, device: torch.device, marker: str = "") -> None:
        self.marker = marker

    def __call__(self, clips: np.ndarray) -> np.ndarray:
        if self.marker and not Path(self.marker).exists():
            Path(self.marker).touch()
            os._exit(1)
        values = [[*clip.mean(axis=(0, 1, 2)), clip[0].std()] for clip in clips]
        return np.array(values, dtype=np.float32)[:, None]


def extracted(videos: Path, folder: Path, actors: int, marker: str = "", batch_size: int = 3) -> np.ndarray:
    files = sorted((videos / "real").iterdir())
    records = [VideoRecord(str(f), 1, "h264", SIZE, SIZE, 8.0, 16, 0, "video", "test", "ok", "") for f in files]
    clips = [Clip(record, 0, 1) for record in records]
    workers = Workers(device=torch.device("cpu"), batch_size=batch_size, max_actors=actors, cpus=0.5, gpus=1)
    sets = [ClipSet(clips, FeatureStore(str(folder)))]
    ((features, _),) = extract("means", sets, functools.partial(Means, marker=marker), 16, None, workers)
    return features.array()


def direct(videos: Path) -> np.ndarray:
    """The same without Ray."""
    measure = Means(torch.device("cpu"))
    files = sorted((videos / "real").iterdir())
    return np.concatenate([measure(decode_clip(f.read_bytes(), 0, 16)[None]) for f in files])


def test_three_workers_give_the_same_score(cluster: None, videos: Path, tmp_path: Path) -> None:
    features, expected = extracted(videos, tmp_path / "many", 3)[:, 0], direct(videos)[:, 0]
    score = frechet_distance(features[:4], features[4:])
    assert score == pytest.approx(frechet_distance(expected[:4], expected[4:]), rel=1e-9)


def test_a_killed_worker_counts_no_video_twice(cluster: None, videos: Path, tmp_path: Path) -> None:
    marker = tmp_path / "killed"
    assert np.array_equal(extracted(videos, tmp_path / "broken", 2, str(marker)), direct(videos))
    assert marker.exists()
    ids = [i for f in (tmp_path / "broken").iterdir() for i in pq.read_table(f)["id"].to_pylist()]
    assert sorted(ids) == list(range(8))


def test_only_missing_features_are_extracted(cluster: None, videos: Path, tmp_path: Path) -> None:
    """5 of 8 clips have features: only batches with a clip that has none are computed."""
    expected = direct(videos)
    there = [ClipFeatures(i, "", 0, "", expected[i]) for i in range(5)]
    FeatureStore(str(tmp_path / "store")).append(there)
    assert np.array_equal(extracted(videos, tmp_path / "store", 1, batch_size=2), expected)
    parts = sorted(pq.read_table(f)["id"].to_pylist() for f in (tmp_path / "store").iterdir())
    assert parts == [[0, 1, 2, 3, 4], [4, 5, 6, 7]]


# Errors


def test_errors_before_ray_starts(
    videos: Path, weights: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("Ray was started before the input was checked")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", fail)
    (tmp_path / "empty").mkdir()
    real, fake = ["--real", str(videos / "real")], ["--fake", str(videos / "other")]
    cases: list[tuple[int, str, list[str]]] = [
        (2, "There is nothing to score: give --fake", real),
        (1, "There is no manifest or folder of videos nowhere", ["--real", "nowhere", *fake]),
        (1, f"There is no video in {tmp_path / 'empty'}", ["--real", str(tmp_path / "empty"), *fake]),
        (2, "num_clips and num_frames must be at least 2", [*real, *fake, "--num-clips", "1"]),
        (2, "there is no metric 'fdv': did you mean 'fvd'?", [*real, *fake, "--metrics", "fdv"]),
        (2, "none of them twice", [*real, *fake, "--metrics", "fvd,fvd"]),
        (2, "styleganv does not define fid-vid: use ardiff-release", [*real, *fake, "--metrics", "fid-vid"]),
        (2, "clips of at least 10 frames, got 9", [*real, *fake, "--frames", "9", "--weights", weights["i3d"]]),
        (2, "20 is no multiple", [*real, *fake, "--frames", "20", "--protocol=ardiff-release", "--metrics=fid-vid"]),
        (
            2,
            "OpenVINO does not compute the network 'inception'",
            [*real, *fake, "backend=openvino", "--metrics=fid-img"],
        ),
        (
            2,
            "drift is measured by fvd, which jedi does not",
            [*real, *fake, "--protocol=jedi", "--drift", "--metrics=jedi"],
        ),
        (2, "drift compares segments of 16", [*real, *fake, "--drift", "--frames", "16"]),
        (1, "other has 4 videos, but num_clips is 5", [*real, *fake, "--num-clips", "5", "--weights", weights["i3d"]]),
        (1, "no weights of the network 'i3d': run `ardiff weights fetch i3d`", [*real, *fake]),
        (2, "Two sets are called 'other'", [*real, "--fake", f"{videos / 'other'},{videos / 'other'}/"]),
    ]
    for code, message, arguments in cases:
        capfd.readouterr()
        assert main(["evaluate", *arguments, "--output", str(tmp_path / "out")]) == code, message
        said = capfd.readouterr().err
        assert message in said
        assert said.startswith("ardiff: ")
        assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("few", "2 of 4 videos in"),
        ("short", "are shorter than the 16 frames of a clip"),
        ("sizes", "different sizes (32x32 and 48x48, height x width): give --resolution"),
        ("broken", "1 of 9 videos in"),
        ("unpaired", "has no original called '000'"),
    ],
)
def test_errors_after_opening_the_videos(
    evaluate: Evaluate, videos: Path, weights: dict[str, str], tmp_path: Path, case: str, message: str
) -> None:
    real, fake, settings = videos / "real", videos / "other", ["--weights", weights["i3d"]]
    match case:
        case "few":
            fake = put(tmp_path / "fake", 2)
            for file in put(tmp_path / "short", 2, frames=12).iterdir():
                shutil.copy(file, fake / f"short-{file.name}")
        case "short":
            fake = put(tmp_path / "fake", 4, frames=12)
        case "sizes":
            fake = put(tmp_path / "fake", 4, size=48)
        case "broken":
            real = tmp_path / "real"
            shutil.copytree(videos / "real", real)
            (real / "zzz.mp4").write_bytes(b"words")
        case _:
            real = put(tmp_path / "real", 4)
            (real / "000.mp4").rename(real / "new.mp4")
            settings = ["--metrics", "psnr"]
    code, said = evaluate(real, "--fake", fake, "--output", tmp_path / "out", *settings)
    assert code in (1, 2)
    complaint = said.splitlines()[-1]
    assert complaint.startswith("ardiff: ")
    assert message in complaint
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "scores.json").exists()


# Other inputs: cheap networks


def test_array_files_and_reconstructions(
    evaluate: Evaluate, tmp_path: Path, make_vae: Callable[..., ARAutoencoder]
) -> None:
    """Real videos in an npz, generated ones as GIFs, cropped; and an AR-VAE's reconstructions of the real clips."""
    wide = {f"v{i:02d}": np.concatenate([video(i, 16)] * 2, axis=2)[:, :, :48] for i in range(16)}
    np.savez(tmp_path / "real.npz", **wide)
    (tmp_path / "gifs").mkdir()
    for i in range(8):
        pictures = [Image.fromarray(frame) for frame in video(i + 50, 16)]
        pictures[0].save(tmp_path / "gifs" / f"{i}.gif", save_all=True, append_images=pictures[1:], duration=125)
    vae = make_vae(resolution=32)
    save_autoencoder(str(tmp_path / "vae"), vae)
    arguments = ["--fake", tmp_path / "gifs", "--num-clips", 8, "--resolution", 32, "--output", tmp_path / "out"]
    code, said = evaluate(tmp_path / "real.npz", *arguments, "--metrics", "frame-difference")
    assert code == 0, said
    gifs = by_metric(tmp_path / "out")["gifs", "frame-difference"]
    p = gifs.protocol
    assert (p.codec_real, p.codec_fake, p.real_split, p.resolution, p.fit) == ("raw", "gif", "folder", "32x32", "crop")
    assert (gifs.baseline_num, p.num_real, p.num_fake) == (8, 8, 8)

    arguments = ["--reconstruct", tmp_path / "vae", "--num-clips", 8, "--resolution", 32, "--output", tmp_path / "rec"]
    code, said = evaluate(tmp_path / "real.npz", *arguments, "--metrics", "psnr,ssim-grey,frame-difference")
    assert code == 0, said
    scores = by_metric(tmp_path / "rec")
    assert {name for name, _ in scores} == {"reconstruction"}
    score = scores["reconstruction", "psnr"]
    assert (score.protocol.codec_fake, score.protocol.num_real) == ("ar-vae", 8)
    stored = FeatureStore(str(next((tmp_path / "rec" / "features").glob("pairs-*"))))
    for row in stored.clips(8):
        name = row.uri.rpartition("/")[2]
        square = wide[name][:, :, 8:40]
        assert row.sha256.split(":")[0] == hashlib.sha256(square.tobytes()).hexdigest()
        again = reconstruct(vae, square[None])[0]
        assert row.sha256.split(":")[1] == hashlib.sha256(again.tobytes()).hexdigest()
    values = stored.read(8)[0].array()[:, 0, 0]
    assert score.score == pytest.approx(values.mean(), rel=1e-6)
    names = [row.uri.rpartition("/")[2] for row in stored.clips(8)]
    expected = [frame_psnr(wide[n][:, :, 8:40], reconstruct(vae, wide[n][None, :, :, 8:40])[0]) for n in names]
    assert values == pytest.approx(expected, rel=1e-5)
    assert scores["reconstruction", "frame-difference"].score > 0
    assert score.protocol.fit == "crop"

    arguments = [*arguments[:4], "--output", tmp_path / "whole"]
    code, said = evaluate(tmp_path / "real.npz", *arguments, "--metrics", "psnr")
    assert code == 0, said
    cropped = by_metric(tmp_path / "whole")["reconstruction", "psnr"]
    assert (cropped.protocol.fit, cropped.score) == ("crop", score.score)


def test_cpus_of_an_actor_do_not_change_the_digits(cluster: None, tmp_path: Path, weights: dict[str, str]) -> None:
    """An actor of three CPUs measures three clips at once, each in one thread."""
    files = sorted(put(tmp_path / "videos", 3).iterdir())
    records = [VideoRecord(str(f), 1, "h264", SIZE, SIZE, 8.0, 16, 0, "video", "test", "ok", "") for f in files]
    clips = [Clip(record, 0, 1) for record in records]
    features = []
    for cpus in (1.0, 3.0):
        workers = Workers(device=torch.device("cpu"), batch_size=3, max_actors=1, cpus=cpus, gpus=1)
        sets = [ClipSet(clips, FeatureStore(str(tmp_path / f"{cpus}")))]
        ((extracted_features, _),) = extract("threads", sets, ThreadsAndConvolution, 16, None, workers)
        features.append(extracted_features.array())
    assert np.array_equal(*features)
    assert (features[0][:, 0, -1] == 1).all(), "more than one thread computes a clip"


class ThreadsAndConvolution:
    """A convolution whose sums depend on the number of threads, and that number."""

    def __init__(self, device: torch.device) -> None:
        self.weight = torch.randn(8, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def __call__(self, clips: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(clips).float().permute(0, 4, 1, 2, 3)
        values = torch.nn.functional.conv3d(x, self.weight).mean(dim=(2, 3, 4))
        threads = torch.full((len(clips), 1), torch.get_num_threads())
        return torch.cat([values, threads], dim=1)[:, None].numpy()


def test_features_from_anywhere_need_neither_videos_nor_a_cluster(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", fail)
    generator = np.random.default_rng(0)
    np.save(tmp_path / "real.npy", generator.normal(size=(200, 12)))
    np.savez(tmp_path / "good.npz", features=generator.normal(size=(100, 12)))
    pq.write_table(pa.table({"features": list(generator.normal(1.0, 1.0, (100, 12)))}), tmp_path / "bad.parquet")
    arguments = ["--real-features", str(tmp_path / "real.npy"), "--output", str(tmp_path / "out")]
    files = f"{tmp_path / 'good.npz'},{tmp_path / 'bad.parquet'}"
    assert main(["evaluate", "--features", files, *arguments]) == 0
    scores = by_metric(tmp_path / "out")
    assert set(scores) == {(name, metric) for name in ("good.npz", "bad.parquet") for metric in ("frechet", "kernel")}
    good, bad = scores["good.npz", "frechet"], scores["bad.parquet", "frechet"]
    assert bad.score > 10 > 2 > good.score
    assert (good.baseline_num, good.protocol.num_real, good.protocol.num_fake) == (100, 100, 100)
    assert good.infinity is not None
    assert good.infinity_low == 0.0
    assert 9 < (bad.infinity or 0) < 15
    assert good.checks is not None
    assert good.checks.num_clips == 100
    assert good.protocol.real_data == bad.protocol.real_data
    assert "12 features from files" in capfd.readouterr().err
    jedi = ["evaluate", "--features", str(tmp_path / "good.npz"), *arguments[:2], "--protocol", "jedi"]
    assert main([*jedi, "--output", str(tmp_path / "jedi")]) == 0
    [score] = read_scores(str(tmp_path / "jedi"))
    assert (score.metric, score.protocol.name) == ("jedi", "jedi")
    assert 0 < score.score < (score.baseline or 0) * 3
    np.save(tmp_path / "other.npy", generator.normal(size=(100, 11)))
    assert main(["evaluate", "--features", str(tmp_path / "other.npy"), *arguments]) == 1
    assert "compute both with the same network" in capfd.readouterr().err
    (tmp_path / "more").mkdir()
    np.save(tmp_path / "more" / "other.npy", generator.normal(size=(100, 12)))
    same = f"{tmp_path / 'other.npy'},{tmp_path / 'more' / 'other.npy'}"
    assert main(["evaluate", "--features", same, *arguments]) == 2
    assert "Two sets are called 'other.npy': give files of different names" in capfd.readouterr().err
    assert main(["evaluate", "--features", files, "--output", str(tmp_path / "out")]) == 2
    assert "features and real_features go together" in capfd.readouterr().err
