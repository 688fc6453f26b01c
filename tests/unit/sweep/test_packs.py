"""Packs change no bit of a video, and what fails in a pack is found alone."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_rows import make_row

from ardiff.data.encode import encode_video
from ardiff.errors import CheckpointError, StorageError
from ardiff.sampling.config import EngineConfig
from ardiff.sweep.packs import Tries, in_order, make_pack, make_rows, pack_rows, record_failure
from ardiff.sweep.rows import Record, VideoRow, read_complete, read_record
from ardiff.vae import DecoderCache


def rows_in(folder: Path, count: int, **changes: Any) -> list[VideoRow]:
    settings = {"num_frames": 12, "ar_step": 2, "num_inference_steps": 6, **changes}
    return [make_row(str(folder), n, label=n % 3, class_name="", **settings) for n in range(count)]


def frames_of(pipeline: Any, rows: list[VideoRow], size: int) -> list[str]:
    return [r.frames_sha256 for pack in pack_rows(rows, size) for r in make_pack(pipeline, pack, [1] * len(pack))]


@pytest.mark.parametrize("mode", ["window", "rolling", "full"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_frames_do_not_depend_on_the_pack(make_pipeline: Any, tmp_path: Path, mode: str, guidance: float) -> None:
    pipeline = make_pipeline(width=32, num_heads=2, attention_window=8)
    rows = rows_in(tmp_path, 7, mode=mode, guidance_scale=guidance)
    expected = frames_of(pipeline, rows, 7)
    assert len(set(expected)) == 7
    for size in (1, 2, 3, 5):
        assert frames_of(pipeline, rows, size) == expected, size
    assert frames_of(pipeline, rows[::-1], 4) == expected[::-1]


def test_nor_does_a_long_video_that_is_made_alone(make_pipeline: Any, tmp_path: Path) -> None:
    """Frames are decoded one at a time, and MKL rounds a single video's rows otherwise, which shows in a few pixels."""
    rows = rows_in(tmp_path, 8, num_frames=120, ar_step=1, num_inference_steps=8)
    pipeline = make_pipeline()
    assert frames_of(pipeline, rows, 1) == frames_of(pipeline, rows, 8)


@pytest.mark.parametrize(("attention", "execution"), [("ragged", "plain"), ("masked", "packed"), ("flex", "plain")])
def test_nor_for_the_ways_to_compute(make_pipeline: Any, tmp_path: Path, attention: str, execution: str) -> None:
    pipeline = make_pipeline(width=48, num_heads=3)
    pipeline.engine_config = EngineConfig(attention_backend=attention, backend=execution)  # type: ignore[arg-type]
    rows = rows_in(tmp_path, 5)
    assert frames_of(pipeline, rows, 1) == frames_of(pipeline, rows, 3) == frames_of(pipeline, rows, 5)


def test_nor_for_bfloat16_weights(make_pipeline: Any, tmp_path: Path) -> None:
    pipeline = make_pipeline(width=48, num_heads=3).to("cpu", torch.bfloat16)
    rows = rows_in(tmp_path, 5)
    assert frames_of(pipeline, rows, 1) == frames_of(pipeline, rows, 3) == frames_of(pipeline, rows, 5)


def test_what_is_stored_is_what_the_pipeline_makes(make_pipeline: Any, tmp_path: Path) -> None:
    pipeline = make_pipeline()
    row = make_row(str(tmp_path), 3, latents=True, num_frames=20, ar_step=1)
    told: list[int] = []
    [record] = make_pack(pipeline, [row], [2], told.append)
    settings = {"num_frames": 20, "ar_step": 1, "num_inference_steps": 4}
    video = pipeline(class_label=1, seed=[3, 3], **settings).numpy()[0]
    assert record.frames_sha256 == hashlib.sha256(video.tobytes()).hexdigest()
    assert Path(row.uri).read_bytes() == encode_video(video, 8.0, crf=8)
    assert record.file_sha256 == hashlib.sha256(Path(row.uri).read_bytes()).hexdigest()
    latents = load_file(row.latents)["latents"]
    assert latents.shape == (20, 2, 4)
    again = torch.stack(list(pipeline.decode(latents[None], DecoderCache())), dim=1)[0]
    assert (np.abs(again.numpy().astype(int) - video) <= 1).all()
    assert read_complete(row) == record
    assert (record.pack, record.attempts, record.device) == (1, 2, "cpu")
    assert told == list(range(1, 21))
    assert record.started < record.finished
    assert set(record.statistics) == {"brightness", "contrast", "saturation", "sharpness", "motion"}


def test_packs_hold_rows_of_one_kind(tmp_path: Path) -> None:
    rows = rows_in(tmp_path, 5)
    assert [[r.seed for r in p] for p in pack_rows(rows, 2)] == [[0, 1], [2, 3], [4]]
    mixed = [rows[0], make_row(str(tmp_path), 9, num_frames=4), rows[1], make_row(str(tmp_path), 8, label=-1)]
    assert [len(p) for p in pack_rows(mixed, 4)] == [1, 1, 1, 1]
    assert pack_rows([], 4) == []


def test_quick_packs_come_last_and_jobs_begin_at_different_places(tmp_path: Path) -> None:
    packs = [rows_in(tmp_path, 1, ar_step=s, guidance_scale=g) for s in (2, 3, 4, 6) for g in (1.0, 2.0, 3.0)]
    orders = [in_order(packs) for _ in range(50)]
    for order in orders:
        assert sorted(map(packs.index, order)) == list(range(12))
        assert [pack[0].ar_step == 2 for pack in order] == [False] * 9 + [True] * 3
    assert len({packs.index(order[0]) for order in orders}) > 1
    assert in_order(packs[:1]) == packs[:1]


def test_what_a_failing_pack_has_stored_is_not_made_again(tmp_path: Path) -> None:
    rows, seen = rows_in(tmp_path, 4), []

    def make(pack: list[VideoRow], tries: list[int]) -> Iterator[Record]:
        seen.append([row.seed for row in pack])
        for row in pack:
            if row.seed == 2 and len(pack) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield Record(id=row.id, status="ok")

    found = list(make_rows(rows, make, lambda pack: None, {}, 2))
    assert sorted(record.id for record in found) == sorted(row.id for row in rows)
    assert seen == [[0, 1, 2, 3], [2], [3]]


def test_a_device_that_has_failed_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []

    def end(code: int) -> None:
        ended.append(code)
        raise SystemExit(code)

    def make(pack: list[VideoRow], tries: list[int]) -> Iterator[Record]:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        yield

    monkeypatch.setattr("os._exit", end)
    with pytest.raises(SystemExit):
        list(make_rows(rows_in(tmp_path, 2), make, lambda pack: None, {}, 2))
    assert ended == [1]


def test_a_model_that_does_not_load_is_not_the_rows_fault(tmp_path: Path) -> None:
    maker = Maker(bad=(1,), error=CheckpointError("it has changed"))
    with pytest.raises(CheckpointError, match="it has changed"):
        list(make_rows(rows_in(tmp_path, 2), maker, lambda pack: None, {}, 2))


class Maker:
    """Makes packs of at most ``room`` videos, and never the ``bad`` seeds."""

    def __init__(self, room: int = 99, bad: tuple[int, ...] = (), error: Exception | None = None) -> None:
        self.room, self.bad = room, bad
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")
        self.seen: list[list[int]] = []

    def __call__(self, pack: list[VideoRow], tries: list[int]) -> Iterator[Record]:
        self.seen.append([row.seed for row in pack])
        if len(pack) > self.room or any(row.seed in self.bad for row in pack):
            raise self.error
        for row, attempts in zip(pack, tries, strict=True):
            yield Record(id=row.id, status="ok", attempts=attempts)


def made(rows: list[VideoRow], maker: Maker, attempts: int = 2, **tried: Tries) -> dict[str, Record]:
    begun: list[int] = []
    found = list(make_rows(rows, maker, lambda pack: begun.append(len(pack)), tried, attempts))
    assert len({r.id for r in found}) == len(found) == len(rows)
    assert begun == [len(seeds) for seeds in maker.seen]
    return {r.id: r for r in found}


def test_a_pack_that_does_not_fit_is_halved(tmp_path: Path) -> None:
    maker = Maker(room=2)
    records = made(rows_in(tmp_path, 7), maker)
    assert maker.seen == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3], [0, 1], [2, 3], [4, 5, 6], [4, 5], [6]]
    assert {r.status for r in records.values()} == {"ok"}
    assert [records[f"id{n}"].attempts for n in (0, 4, 6)] == [3, 3, 3]


def test_a_bad_row_is_found_alone_and_the_others_are_made(tmp_path: Path) -> None:
    rows = rows_in(tmp_path, 4)
    maker = Maker(bad=(2,), error=ValueError("no such class"))
    records = made(rows, maker, attempts=3)
    assert {i for i, r in records.items() if r.status == "ok"} == {"id0", "id1", "id3"}
    assert maker.seen.count([2]) == 3
    failed = records["id2"]
    assert (failed.error, failed.message, failed.attempts) == ("ValueError", "no such class", 5)
    assert read_record(rows[2]) == failed


def test_where_the_process_died_packs_are_smaller_and_a_row_that_kills_is_given_up(tmp_path: Path) -> None:
    rows = rows_in(tmp_path, 4)
    maker = Maker()
    made(rows, maker, **{r.id: Tries(1, 0) for r in rows})
    assert maker.seen == [[0, 1], [2, 3]]
    records = made([rows[0]], maker := Maker(), attempts=2, id0=Tries(5, 2))
    assert maker.seen == []
    assert "died" in records["id0"].message


def test_storage_that_is_away_is_no_fault_of_the_row(tmp_path: Path) -> None:
    rows = rows_in(tmp_path, 2)
    with pytest.raises(StorageError, match="away"):
        made(rows, Maker(bad=(0,), error=StorageError("The server is away.")))
    assert read_record(rows[0]) is None


def test_a_failure_does_not_hide_what_another_job_has_made(make_pipeline: Any, tmp_path: Path) -> None:
    [row] = rows_in(tmp_path, 1)
    [record] = make_pack(make_pipeline(), [row], [1])
    assert record_failure(row, "ValueError", "x", 1) == record
    assert read_record(row) == record


def test_what_had_failed_for_good_keeps_its_reason_when_the_process_dies_later(tmp_path: Path) -> None:
    rows = rows_in(tmp_path, 2)
    failed = made(rows, Maker(bad=(0,), error=ValueError("no such class")))["id0"]
    again = made(rows, Maker(), id0=Tries(failed.attempts, 2), id1=Tries(2, 1))["id0"]
    assert again == failed == read_record(rows[0])
