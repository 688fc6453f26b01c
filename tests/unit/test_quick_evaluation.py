"""Scores of the quick evaluation from measurements of its clips. No Ray is started."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from ardiff.data.manifest import VideoRecord
from ardiff.errors import ConfigError
from ardiff.metrics.compare import comparable
from ardiff.metrics.scores import SetScore, read_scores, table, write_scores
from ray_jobs.evaluation.config import QuickConfig
from ray_jobs.evaluation.datasets import Clip, Dataset
from ray_jobs.evaluation.quick import compute_scores, has_fvd, resolution_of, summarize
from ray_jobs.reports.quickstart import _score

COUNT, WITH_I3D = 12, 4
SHIFTS = {"reference": 0.0, "real": 0.0, "ar-step-5": 0.5, "noise": 4.0, "shuffled frames": 2.0}


def record(uri: str, size: int = 32, codec: str = "vp9") -> VideoRecord:
    return VideoRecord(uri, 1, codec, size, size, 8.0, 20, 0, "video", "test", "ok", "")


def sets(num_videos: int) -> dict[str, list[Clip]]:
    """The first half of the real videos is the reference. Videos occur again if there are too few."""
    real = [Clip(record(f"{i % num_videos}.mp4"), i, 1) for i in range(2 * COUNT)]
    clips = dict.fromkeys(SHIFTS, real[COUNT:]) | {"reference": real[:COUNT]}
    return clips | {"ar-step-5": [Clip(record(f"g/{i}.mp4", codec="h264"), 0, 1) for i in range(COUNT)]}


def scored(num_videos: int = 2 * COUNT, **settings: Any) -> tuple[list[SetScore], dict[str, Any]]:
    generator, rows = np.random.default_rng(0), []
    clips = sets(num_videos)
    for name, shift in SHIFTS.items():
        for i, clip in enumerate(clips[name]):
            row = {"set": name, "index": i, "uri": clip.video.uri, "start": clip.start, "sha256": f"{name}{i}"}
            row["features"] = generator.normal(shift, 1.0, 6).tolist()
            if has_fvd(name) and i < WITH_I3D:
                row["i3d"] = generator.normal(shift, 1.0, 400).tolist()
            if name == "ar-step-5":
                row["recognised"] = i % 2 == 0
            rows.append(row)
    frame = pd.DataFrame(rows).sort_values(["set", "index"], ignore_index=True)
    config = QuickConfig(num_clips=COUNT, batch_size=4, **{"bootstrap": 20, **settings})
    datasets = [Dataset("data/manifest.parquet", [], []), Dataset("samples/ar-step-5/manifest.parquet", [], [])]
    scores = compute_scores(config, frame, clips, datasets, ({}, "weights-sha"))
    return scores, summarize(frame, scores)


def test_every_score_has_baseline_interval_and_protocol(tmp_path: Path) -> None:
    scores, summary = scored()
    by_name = {(s.set, s.metric): s for s in scores}
    assert {name for name, metric in by_name if metric == "distance"} == SHIFTS.keys() - {"reference"}
    assert {name for name, metric in by_name if metric == "fvd"} == SHIFTS.keys() - {"reference", "noise"}
    for metric, count in (("distance", COUNT), ("fvd", WITH_I3D)):
        model, real = by_name["ar-step-5", metric], by_name["real", metric]
        assert (model.baseline, model.baseline_num) == (real.score, count)
        assert model.low is not None
        assert model.low < model.score < (model.high or 0)
        assert by_name["shuffled frames", metric].low is None
        protocol = model.protocol
        assert (protocol.num_real, protocol.num_fake, protocol.codec_fake) == (count, count, "h264")
        assert (protocol.name, protocol.resolution, protocol.real_split) == ("quick", "32x32", "test")
        assert (model.fake, real.fake) == ("samples/ar-step-5/manifest.parquet", "data/manifest.parquet")
        assert model.fake_data != real.fake_data
    fvd = by_name["real", "fvd"].protocol
    assert (fvd.network, fvd.weights, fvd.ddof, fvd.resize) == ("i3d", "weights-sha", 0, "bilinear to 224x224")
    assert fvd.real_data != by_name["real", "distance"].protocol.real_data

    assert summary["sets"]["ar-step-5"] == {
        "distance": by_name["ar-step-5", "distance"].score,
        "fvd": by_name["ar-step-5", "fvd"].score,
        "recognised": 0.5,
    }
    assert summary["extractors"] == {"distance": "random3d-seed0-v2", "fvd": "i3d, Kinetics-400, 4 clips a set"}
    content = write_scores(str(tmp_path), scores, {}, summary)
    assert content["sets"] == summary["sets"]
    assert read_scores(str(tmp_path)) == scores
    assert len(comparable((str(tmp_path), str(tmp_path)))) == 2 * len(scores)
    assert pq.read_table(tmp_path / "scores.parquet").num_rows == len(scores)
    text = table([(s.set, s) for s in scores])
    assert "95 % interval" in text
    assert "distance (quick: random3d seed0-v2, 16 frames" in text
    row = _score(content["scores"][0], summary["sets"]["ar-step-5"])
    assert (row.name, row.unit, row.highlight) == ("ar-step-5", "distance", True)
    assert row.note.startswith("95 % interval ")
    assert row.note.endswith(", class recognised 50 %")


def test_a_baseline_is_of_other_videos() -> None:
    assert all(score.baseline is None for score in scored(num_videos=COUNT + 1)[0])


def test_intervals_can_be_left_out() -> None:
    assert all(score.low is None for score in scored(bootstrap=0)[0])


def test_videos_are_of_oneresolution_of() -> None:
    mixed = {"reference": [Clip(record("a"), 0, 1)], "x": [Clip(record("b", 64), 0, 1)]}
    with pytest.raises(ConfigError, match="different sizes"):
        resolution_of(QuickConfig(), mixed)
    assert resolution_of(QuickConfig(resolution=32), mixed) == "32x32"
