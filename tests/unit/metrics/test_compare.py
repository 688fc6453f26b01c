"""Scores as files, and side by side if they are of one protocol."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ardiff.cli import main
from ardiff.metrics.manifold import SetChecks
from ardiff.metrics.protocol import Protocol
from ardiff.metrics.scores import SetScore, read_scores, table, write_scores

PROTOCOL = Protocol(
    name="styleganv",
    metric="fvd",
    network="i3d",
    weights="d8922d739a2a",
    feature="400 logits",
    num_frames=16,
    stride=1,
    resolution="64x64",
    resize="bilinear to 224x224",
    value_range="[-1, 1]",
    codec_real="h264",
    codec_fake="h264",
    num_real=256,
    num_fake=256,
    ddof=0,
    real_split="test",
    real_data="0123",
)
SCORE = SetScore(
    set="videos",
    metric="fvd",
    score=66.3,
    baseline=8.25,
    baseline_num=256,
    low=60.1,
    high=72.9,
    infinity=51.0,
    fake="runs/videos",
    fake_data="4567",
    protocol=PROTOCOL,
)
PSNR = replace(
    SCORE, metric="psnr", score=30.0, baseline=None, baseline_num=None, low=None, high=None, infinity=None,
    protocol=replace(PROTOCOL, name="paired", metric="psnr"),
)  # fmt: skip


def written(folder: Path, *scores: SetScore) -> str:
    write_scores(str(folder), scores, {"torch": "2"})
    return str(folder)


def test_checks_reach_the_table_file_after_a_score_without_them(tmp_path: Path) -> None:
    checks = SetChecks(num_clips=40, coverage=0.5, duplicates=1, copies=2)
    written(tmp_path / "a", PSNR, replace(SCORE, checks=checks))
    first, second = pq.read_table(tmp_path / "a" / "scores.parquet").to_pylist()
    assert (first["checks_num_clips"], first["checks_copies"]) == (None, None)
    assert (second["checks_num_clips"], second["checks_coverage"], second["checks_copies"]) == (40, 0.5, 2)


def test_scores_come_back_as_they_were(tmp_path: Path) -> None:
    place = written(tmp_path / "a", SCORE, PSNR)
    assert read_scores(place) == [SCORE, PSNR]
    assert read_scores(f"{place}/scores.json") == [SCORE, PSNR]
    assert json.loads((tmp_path / "a" / "scores.json").read_text())["versions"] == {"torch": "2"}
    rows = pq.read_table(tmp_path / "a" / "scores.parquet").to_pylist()
    assert [row["score"] for row in rows] == [66.3, 30.0]
    assert rows[0]["protocol_real_data"] == "0123"
    assert {f"protocol_{f.name}" for f in fields(Protocol)} <= rows[0].keys()


def test_equal_protocols_are_tabled_best_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = written(tmp_path / "a", SCORE, PSNR)
    second = written(tmp_path / "b", replace(SCORE, score=40.8), replace(PSNR, score=33.0))
    assert main(["compare", first, second, "--output", str(tmp_path / "table.txt")]) == 0
    text = capsys.readouterr().out
    assert (tmp_path / "table.txt").read_text() == text
    names = [line.split(": videos")[0].strip() for line in text.splitlines() if ": videos" in line]
    assert names == [second, first, second, first]  # FVD is better low, PSNR high
    assert "60.10 .. 72.90" in text
    assert "psnr in dB" in text


@pytest.mark.parametrize("field", [field.name for field in fields(Protocol) if field.name != "metric"])
def test_another_protocol_is_refused_by_the_field(
    field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = getattr(PROTOCOL, field)
    other = replace(PROTOCOL, **{field: 1 if field == "ddof" else value + ("x" if isinstance(value, str) else 1)})
    runs = [written(tmp_path / "a", SCORE), written(tmp_path / "b", replace(SCORE, protocol=other))]
    assert main(["compare", *runs]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"'{field}' is {value!r} in one protocol" in captured.err
    assert captured.err.startswith(f"ardiff: fvd of {runs[0]} and {runs[1]}: ")


def test_what_holds_no_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare"]) == 2
    assert main(["compare", str(tmp_path)]) == 1
    assert "There are no scores in" in capsys.readouterr().err
    for text in ("no json", "[]", '{"sets": {}}', '{"scores": [{"set": "a"}]}'):
        (tmp_path / "scores.json").write_text(text)
        assert main(["compare", str(tmp_path)]) == 1
        assert "holds no scores with a complete protocol" in capsys.readouterr().err


def test_the_table_says_where_the_baseline_is_at_another_n() -> None:
    text = table([("a", replace(SCORE, baseline_num=128)), ("b", SCORE)])
    assert "8.2500 (N 128)" in text
    assert text.count("(N ") == 1
