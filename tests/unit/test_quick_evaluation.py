"""Scores of the quick evaluation from measurements of its clips. No Ray is started."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from ardiff.data.manifest import VideoRecord
from ardiff.errors import ArdiffError, ConfigError, DataError
from ardiff.metrics.compare import comparable
from ardiff.metrics.prompts import PROMPT_MEASURES
from ardiff.metrics.scores import SetScore, read_scores, table, write_scores
from ardiff.metrics.shapes import SHAPE_MEASURES
from ardiff.resolution import Resolution
from ray_jobs.evaluation.config import QuickConfig
from ray_jobs.evaluation.datasets import Clip, Dataset
from ray_jobs.evaluation.quick import has_fvd, resolution_of
from ray_jobs.evaluation.quick_scores import by_condition, compute_scores, describe, summarize
from ray_jobs.evaluation.reconstruction import reconstruct
from ray_jobs.reports.quickstart import (
    _condition_tables,
    _prompt_lines,
    _prompt_tables,
    _score,
    _shape_tables,
    _share_lines,
)

COUNT, WITH_I3D = 12, 4
SHIFTS = {"reference": 0.0, "real": 0.0, "ar-step-5": 0.5, "noise": 4.0, "shuffled frames": 2.0}


def measures(share: float) -> dict[str, float]:
    """The measures of a video whose frames show the asked class in a share of them, and whose motion is not smooth."""
    values = dict.fromkeys(SHAPE_MEASURES, 1.0) | {"frame identity": share}
    return values if share == 1.0 else values | {"neighbours alike": share / 2, "motion": 0.0, "smooth motion": 0.0}


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
            if name in ("real", "ar-step-5", "noise"):
                row |= measures(share=(i % 4) / 3 if name == "ar-step-5" else 1.0)
            rows.append(row)
    frame = pd.DataFrame(rows).sort_values(["set", "index"], ignore_index=True)
    config = QuickConfig(num_clips=COUNT, batch_size=4, **{"partitions": 8, **settings})
    datasets = [Dataset("data/manifest.parquet", [], []), Dataset("samples/ar-step-5/manifest.parquet", [], [])]
    scores = compute_scores(config, frame, clips, datasets, ({}, "weights-sha"))
    return scores, summarize(scores)


def test_every_score_has_baseline_interval_and_protocol(tmp_path: Path) -> None:
    scores, summary = scored()
    by_name = {(s.set, s.metric): s for s in scores}
    assert {name for name, metric in by_name if metric == "distance"} == SHIFTS.keys() - {"reference"}
    assert {name for name, metric in by_name if metric == "fvd"} == SHIFTS.keys() - {"reference", "noise"}
    for metric, count in (("distance", COUNT), ("fvd", WITH_I3D)):
        model, real = by_name["ar-step-5", metric], by_name["real", metric]
        assert (model.baseline, model.baseline_num) == (real.score, count)
        if metric == "fvd":
            assert model.low is None
            assert "There is no interval: it needs 8 videos." in model.notes
        else:
            assert model.low is not None
            assert model.low < model.score < (model.high or 0)
            assert model.notes[0].startswith(f"{COUNT} videos are few for")
        assert by_name["shuffled frames", metric].low is None
        protocol = model.protocol
        assert (protocol.num_real, protocol.num_fake, protocol.codec_fake) == (count, count, "h264")
        assert (protocol.name, protocol.resolution, protocol.real_split) == ("quick", "32x32", "test")
        assert (model.fake, real.fake) == ("samples/ar-step-5/manifest.parquet", "data/manifest.parquet")
        assert model.fake_data != real.fake_data
    fvd = by_name["real", "fvd"].protocol
    assert (fvd.network, fvd.weights, fvd.ddof, fvd.resize) == ("i3d", "weights-sha", 0, "bilinear to 224x224")
    assert fvd.real_data != by_name["real", "distance"].protocol.real_data

    assert (
        summary["sets"]["ar-step-5"].items()
        >= {
            "distance": by_name["ar-step-5", "distance"].score,
            "fvd": by_name["ar-step-5", "fvd"].score,
        }.items()
    )
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
    assert "frames of the asked class 50 %, neighbours alike 38 %, all motion checks 25 %" in row.note


def test_shares_of_videos_are_scores_with_interval_and_baseline() -> None:
    """A quarter of the videos each show the class in none, a third, two thirds and all of their frames."""
    scores, summary = scored()
    by_name = {(s.set, s.metric): s for s in scores}
    model = by_name["ar-step-5", "frame identity"]
    assert model.score == pytest.approx(0.5)
    assert model.low is not None
    assert 0.2 < model.low < 0.5 < (model.high or 0) < 0.8
    assert (model.baseline, model.baseline_num) == (1.0, COUNT)
    assert (model.protocol.metric, model.protocol.network, model.protocol.num_fake) == ("frame identity", "none", COUNT)
    assert by_name["noise", "frame identity"].low is None
    assert ("shuffled frames", "frame identity") not in by_name, "its videos were not measured"
    values = summary["sets"]["ar-step-5"]
    shares = {name: values[name] for name in ("neighbours alike", "motion", "smooth motion", "one object")}
    assert shares == pytest.approx(
        {"neighbours alike": 0.375, "motion": 0.25, "smooth motion": 0.25, "one object": 1.0}
    )
    assert summary["extractors"].keys() == {"distance", "fvd"}


def test_tables_and_the_report_lead_with_frames_and_motion_and_not_with_the_vote() -> None:
    scores, summary = scored()
    text = table([(s.set, s) for s in scores])
    header, *rows = text[text.index("means over videos (quick: mean over videos, 16 frames") :].splitlines()[1:]
    assert header.split("  ")[-9:] == list(SHAPE_MEASURES)
    assert [row.split("  ")[1] for row in rows] == ["noise", "real", "ar-step-5"]
    assert rows[-1].split()[1:5] == ["50", "%", "38", "%"]
    sets = summary["sets"]
    identity, motion = _share_lines(sets | {"ar-step-0": sets["real"]}, ["ar-step-5", "ar-step-0"])
    assert "asked class: 50 to 100 %; neighbouring frames that show the same shape: 38 to 100 %" in identity
    assert "motion checks: 25 to 100 % (one object 100 %, " in motion
    assert "recognised" not in identity + motion
    [shown] = _shape_tables(sets)
    assert shown.header == ["set", *SHAPE_MEASURES]
    assert shown.rows[-1][:3] == ["ar-step-5", "50", "38"]


def test_scores_of_earlier_versions_are_read_and_not_compared(tmp_path: Path) -> None:
    """They have no measures of single frames, and their distance is of another network."""
    old = {"distance": 20.0, "recognised": 0.9, "motion": 0.5, "psnr": 30.0}
    assert describe(old) == "PSNR 30.0 dB"
    assert _share_lines({"real": old, "ar-step-5": old}, ["ar-step-5"]) == []
    assert _shape_tables({"real": old}) == []
    scores, _ = scored()
    [score] = [s for s in scores if (s.set, s.metric) == ("real", "distance")]
    earlier = replace(score, protocol=replace(score.protocol, weights="random3d-seed0-v1"))
    for name, content in (("old", [earlier]), ("new", scores)):
        write_scores(str(tmp_path / name), content, {})
    with pytest.raises(ArdiffError, match=r"distance of .*'weights' is 'random3d-seed0-v1' in one protocol"):
        comparable((str(tmp_path / "old"), str(tmp_path / "new")))


def test_a_baseline_is_of_other_videos() -> None:
    """A distance has none if the sets share videos; a share is compared with that of real clips in any case."""
    scores, _ = scored(num_videos=COUNT + 1)
    assert {score.metric for score in scores if score.baseline is not None} == set(SHAPE_MEASURES)


def test_intervals_can_be_left_out() -> None:
    distances = ("distance", "fvd")
    assert all(score.low is None for score in scored(partitions=0)[0] if score.metric in distances)


def test_videos_are_of_oneresolution_of() -> None:
    mixed = {"reference": [Clip(record("a"), 0, 1)], "x": [Clip(record("b", 64), 0, 1)]}
    with pytest.raises(ConfigError, match="different sizes"):
        resolution_of(QuickConfig(), mixed)
    assert resolution_of(QuickConfig(resolution=Resolution.square(32)), mixed) == "32x32"


def test_the_report_of_a_model_with_prompts_leads_with_them() -> None:
    shares = dict.fromkeys(PROMPT_MEASURES, 0.9)
    sets = {name: dict(shares) for name in ("real", "ar-step-0", "ar-step-5", "ar-step-5-held-out")}
    sets["ar-step-0"]["prompt followed"] = 0.5
    sets["ar-step-5-held-out"]["prompt followed"] = 0.25
    models = [name for name in sets if name != "real"]
    seen, held_out = _prompt_lines(sets, models)
    assert "asked colour: 50 to 90 %" in seen
    assert "25 %" in held_out
    assert len(_prompt_lines(sets, models[:2])) == 1
    assert _prompt_lines({"real": {}, "ar-step-5": {}}, ["ar-step-5"]) == []
    [table] = _prompt_tables(sets)
    assert [row[0] for row in table.rows] == ["real", "ar-step-5", "ar-step-0", "ar-step-5-held-out"]
    assert _prompt_tables({"real": {}}) == []


def test_means_by_prompt_begin_with_what_is_followed_least() -> None:
    rows = [
        {"set": name, "condition": prompt, "prompt followed": followed, "frame identity": 1.0}
        for name in ("reference", "real", "ar-step-5", "noise")
        for prompt, followed in (("a ring", 1.0), ("a blue plus", 0.0), ("a ring", 0.5), ("a disc", 1.0))
    ]
    means = by_condition(pd.DataFrame(rows))
    assert set(means["set"]) == {"real", "ar-step-5"}
    assert means[means["set"] == "ar-step-5"].to_numpy().tolist() == [
        ["ar-step-5", "a blue plus", 1, 0.0, 1.0],
        ["ar-step-5", "a ring", 2, 0.75, 1.0],
        ["ar-step-5", "a disc", 1, 1.0, 1.0],
    ]
    [table] = _condition_tables(means)
    assert table.header == ["set", "asked", "videos", "prompt followed", "frame identity"]
    assert table.rows[:2] == [["ar-step-5", "a blue plus", "1", "0", "100"], ["ar-step-5", "a ring", "2", "75", "100"]]
    assert len(table.rows) == 3
    assert _condition_tables(means[["set", "condition", "videos"]]) == []


def test_an_ar_vae_reconstructs_frames_of_its_own_shape_only(make_vae) -> None:
    videos = np.zeros((1, 2, 16, 40, 3), np.uint8)
    for sizes in ({"resolution": [16, 40]}, {"resolution": 16, "buckets": [[16, 40]]}):
        assert reconstruct(make_vae(**sizes), videos).shape == videos.shape
    with pytest.raises(DataError, match=r"frames of 40x16, .* the clips have 16x40: give --resolution 40,16\."):
        reconstruct(make_vae(resolution=[40, 16]), videos)
