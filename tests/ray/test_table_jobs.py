"""``prepare`` on tables with the bytes of videos: files are written once, and a second run resumes."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from broken_videos import encode
from jobs import Result

from ardiff.data import storage
from ardiff.data.error_log import read_errors
from ardiff.data.manifest import read_manifest

pytestmark = pytest.mark.ray

Command = Callable[..., Result]


def test_tables_become_videos(ardiff: Command, cluster: None, tmp_path: Path) -> None:
    videos = [encode(crf=15 + i) for i in range(5)]
    rows = {"video": [*videos, b"text"], "label": [0, 1, 0, 1, 0, 1], "caption": [f"c{i}" for i in range(6)]}
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "in" / "train-0.parquet", row_group_size=2)
    pq.write_table(pa.table({**rows, "video": videos[:1] * 6}), tmp_path / "in" / "test-0.parquet")
    (tmp_path / "in" / "train-1.parquet").write_bytes(b"PAR1 and no more")

    plan = ardiff("prepare", f"{tmp_path}/in", f"{tmp_path}/data", "--dry-run")
    assert plan.code == 0
    assert (
        f"# the videos of 2 tables (12 rows, 0.1 MiB) are written once as files to {tmp_path}/data/videos" in plan.out
    )
    assert not (tmp_path / "data").exists()

    said = ardiff("prepare", f"{tmp_path}/in", f"{tmp_path}/data").expect(0)
    assert "the videos of 2 tables (12 rows" in said
    records = read_manifest(f"{tmp_path}/data/manifest.parquet")
    good = [(storage.read_bytes(r.uri), r.class_name, r.captions) for r in records if r.status == "ok"]
    train = [(video, str(i % 2), (f"c{i}",)) for i, video in enumerate(videos)]
    assert sorted(good) == sorted([*train, *((videos[0], str(i % 2), (f"c{i}",)) for i in range(6))])
    assert {r.split for r in records if r.status == "ok" and "/train-0-" in r.uri} == {"train"}
    errors = {row.uri.rpartition("/")[2]: row.error for row in read_errors(f"{tmp_path}/data/errors.parquet")}
    assert errors == {"00002-0000001.bin": "undecodable", "train-1.parquet": "corrupt"}

    index = min((tmp_path / "data" / "videos").glob("train-0-*/00001-*.json"))
    index.unlink()  # as if the job had been interrupted in this row group
    index.with_name("00001-0000000.mp4").unlink()
    said = ardiff("prepare", f"{tmp_path}/in", f"{tmp_path}/data").expect(0)
    assert "1 videos are new or changed, 11 are known, 0 are gone" in said
    again = read_manifest(f"{tmp_path}/data/manifest.parquet")
    assert [(r.uri, r.num_frames, r.status) for r in again] == [(r.uri, r.num_frames, r.status) for r in records]
