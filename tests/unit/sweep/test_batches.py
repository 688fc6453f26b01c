"""Batches change no bit of a video, and a video that fails in a batch ends up alone."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_specs import make_video_spec

from ardiff.data.encode import encode_video
from ardiff.errors import CheckpointError, StorageError
from ardiff.sampling.config import EngineConfig
from ardiff.sweep.batches import (
    Attempts,
    generate_batch,
    generate_with_retries,
    make_batches,
    record_failure,
    schedule_batches,
)
from ardiff.sweep.specs import Record, VideoSpec, read_complete, read_record
from ardiff.vae import DecoderCache


def specs_in(folder: Path, count: int, **changes: Any) -> list[VideoSpec]:
    settings = {"num_frames": 12, "ar_step": 2, "num_inference_steps": 6, **changes}
    return [make_video_spec(str(folder), n, class_label=n % 3, **settings) for n in range(count)]


def frames_of(pipeline: Any, specs: list[VideoSpec], size: int) -> list[str]:
    batches = make_batches(specs, size)
    return [r.frames_sha256 for batch in batches for r in generate_batch(pipeline, batch, [1] * len(batch))]


@pytest.mark.parametrize("mode", ["window", "rolling", "full"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_frames_do_not_depend_on_the_batch(make_pipeline: Any, tmp_path: Path, mode: str, guidance: float) -> None:
    pipeline = make_pipeline(width=32, num_heads=2, attention_window=8)
    specs = specs_in(tmp_path, 7, mode=mode, guidance_scale=guidance)
    expected = frames_of(pipeline, specs, 7)
    assert len(set(expected)) == 7
    for size in (1, 2, 3, 5):
        assert frames_of(pipeline, specs, size) == expected, size
    assert frames_of(pipeline, specs[::-1], 4) == expected[::-1]


def test_frames_of_a_long_video_do_not_depend_on_the_batch(make_pipeline: Any, tmp_path: Path) -> None:
    """Frames are decoded one at a time, and MKL rounds a single video's rows differently, in a few pixels."""
    specs = specs_in(tmp_path, 8, num_frames=120, ar_step=1, num_inference_steps=8)
    pipeline = make_pipeline()
    assert frames_of(pipeline, specs, 1) == frames_of(pipeline, specs, 8)


@pytest.mark.parametrize(("attention", "backend"), [("ragged", "plain"), ("masked", "packed"), ("flex", "plain")])
def test_frames_do_not_depend_on_the_batch_with_any_backend(
    make_pipeline: Any, tmp_path: Path, attention: str, backend: str
) -> None:
    pipeline = make_pipeline(width=48, num_heads=3)
    pipeline.engine_config = EngineConfig(attention_backend=attention, backend=backend)  # type: ignore[arg-type]
    specs = specs_in(tmp_path, 5)
    assert frames_of(pipeline, specs, 1) == frames_of(pipeline, specs, 3) == frames_of(pipeline, specs, 5)


def test_frames_do_not_depend_on_the_batch_with_bfloat16_weights(make_pipeline: Any, tmp_path: Path) -> None:
    pipeline = make_pipeline(width=48, num_heads=3).to("cpu", torch.bfloat16)
    specs = specs_in(tmp_path, 5)
    assert frames_of(pipeline, specs, 1) == frames_of(pipeline, specs, 3) == frames_of(pipeline, specs, 5)


def test_the_stored_video_is_what_the_pipeline_generates(make_pipeline: Any, tmp_path: Path) -> None:
    pipeline = make_pipeline()
    spec = make_video_spec(str(tmp_path), 3, latents=True, num_frames=20, ar_step=1)
    told: list[int] = []
    [record] = generate_batch(pipeline, [spec], [2], told.append)
    settings = {"num_frames": 20, "ar_step": 1, "num_inference_steps": 4}
    video = pipeline(class_label=1, seed=[3, 3], **settings).frames.numpy()[0]
    assert record.frames_sha256 == hashlib.sha256(video.tobytes()).hexdigest()
    assert Path(spec.uri).read_bytes() == encode_video(video, 8.0, crf=8)
    assert record.file_sha256 == hashlib.sha256(Path(spec.uri).read_bytes()).hexdigest()
    latents = load_file(spec.latents)["latents"]
    assert latents.shape == (20, 2, 4)
    again = torch.stack(list(pipeline.decode(latents[None], DecoderCache())), dim=1)[0]
    assert (np.abs(again.numpy().astype(int) - video) <= 1).all()
    assert read_complete(spec) == record
    assert (record.batch_size, record.attempts, record.device) == (1, 2, "cpu")
    assert told == list(range(1, 21))
    assert record.started < record.finished
    assert set(record.statistics) == {"brightness", "contrast", "saturation", "sharpness", "motion"}


def test_batches_hold_specs_of_one_kind(tmp_path: Path) -> None:
    specs = specs_in(tmp_path, 5)
    assert [[s.sampling.seed for s in p] for p in make_batches(specs, 2)] == [[0, 1], [2, 3], [4]]
    mixed = [
        specs[0],
        make_video_spec(str(tmp_path), 9, num_frames=4),
        specs[1],
        make_video_spec(str(tmp_path), 8, class_label=None),
    ]
    assert [len(p) for p in make_batches(mixed, 4)] == [1, 1, 1, 1]
    assert make_batches([], 4) == []


def test_fast_batches_come_last_and_jobs_start_with_different_ones(tmp_path: Path) -> None:
    batches = [specs_in(tmp_path, 1, ar_step=s, guidance_scale=g) for s in (2, 3, 4, 6) for g in (1.0, 2.0, 3.0)]
    orders = [schedule_batches(batches) for _ in range(50)]
    for order in orders:
        assert sorted(map(batches.index, order)) == list(range(12))
        assert [batch[0].sampling.ar_step == 2 for batch in order] == [False] * 9 + [True] * 3
    assert len({batches.index(order[0]) for order in orders}) > 1
    assert schedule_batches(batches[:1]) == batches[:1]


def test_videos_that_a_failing_batch_has_stored_are_not_generated_again(tmp_path: Path) -> None:
    specs, seen = specs_in(tmp_path, 4), []

    def make(batch: list[VideoSpec], tries: list[int]) -> Iterator[Record]:
        seen.append([spec.sampling.seed for spec in batch])
        for spec in batch:
            if spec.sampling.seed == 2 and len(batch) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield Record(id=spec.id, status="ok")

    found = list(generate_with_retries(specs, make, lambda batch: None, {}, 2))
    assert sorted(record.id for record in found) == sorted(spec.id for spec in specs)
    assert seen == [[0, 1, 2, 3], [2], [3]]


def test_a_device_that_has_failed_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []

    def end(code: int) -> None:
        ended.append(code)
        raise SystemExit(code)

    def make(batch: list[VideoSpec], tries: list[int]) -> Iterator[Record]:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        yield

    monkeypatch.setattr("os._exit", end)
    with pytest.raises(SystemExit):
        list(generate_with_retries(specs_in(tmp_path, 2), make, lambda batch: None, {}, 2))
    assert ended == [1]


def test_a_pipeline_that_does_not_load_fails_the_job(tmp_path: Path) -> None:
    maker = Maker(bad=(1,), error=CheckpointError("it has changed"))
    with pytest.raises(CheckpointError, match="it has changed"):
        list(generate_with_retries(specs_in(tmp_path, 2), maker, lambda batch: None, {}, 2))


class Maker:
    """Makes batches of at most ``capacity`` videos, and never the ``bad`` seeds."""

    def __init__(self, capacity: int = 99, bad: tuple[int, ...] = (), error: Exception | None = None) -> None:
        self.capacity, self.bad = capacity, bad
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")
        self.seen: list[list[int]] = []

    def __call__(self, batch: list[VideoSpec], tries: list[int]) -> Iterator[Record]:
        self.seen.append([spec.sampling.seed for spec in batch])
        if len(batch) > self.capacity or any(spec.sampling.seed in self.bad for spec in batch):
            raise self.error
        for spec, attempts in zip(batch, tries, strict=True):
            yield Record(id=spec.id, status="ok", attempts=attempts)


def made(specs: list[VideoSpec], maker: Maker, attempts: int = 2, **tried: Attempts) -> dict[str, Record]:
    begun: list[int] = []
    found = list(generate_with_retries(specs, maker, lambda batch: begun.append(len(batch)), tried, attempts))
    assert len({r.id for r in found}) == len(found) == len(specs)
    assert begun == [len(seeds) for seeds in maker.seen]
    return {r.id: r for r in found}


def test_a_batch_that_does_not_fit_is_halved(tmp_path: Path) -> None:
    maker = Maker(capacity=2)
    records = made(specs_in(tmp_path, 7), maker)
    assert maker.seen == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3], [0, 1], [2, 3], [4, 5, 6], [4, 5], [6]]
    assert {r.status for r in records.values()} == {"ok"}
    assert [records[f"id{n}"].attempts for n in (0, 4, 6)] == [3, 3, 3]


def test_a_failing_video_ends_up_alone_and_the_others_are_generated(tmp_path: Path) -> None:
    specs = specs_in(tmp_path, 4)
    maker = Maker(bad=(2,), error=ValueError("no such class"))
    records = made(specs, maker, attempts=3)
    assert {i for i, r in records.items() if r.status == "ok"} == {"id0", "id1", "id3"}
    assert maker.seen.count([2]) == 3
    failed = records["id2"]
    assert (failed.error, failed.message, failed.attempts) == ("ValueError", "no such class", 5)
    assert read_record(specs[2]) == failed


def test_batches_shrink_after_crashes_and_a_video_that_crashes_is_given_up(tmp_path: Path) -> None:
    specs = specs_in(tmp_path, 4)
    maker = Maker()
    made(specs, maker, **{r.id: Attempts(1, 0) for r in specs})
    assert maker.seen == [[0, 1], [2, 3]]
    records = made([specs[0]], maker := Maker(), attempts=2, id0=Attempts(5, 2))
    assert maker.seen == []
    assert "crashed" in records["id0"].message


def test_unavailable_storage_does_not_fail_the_video(tmp_path: Path) -> None:
    specs = specs_in(tmp_path, 2)
    with pytest.raises(StorageError, match="away"):
        made(specs, Maker(bad=(0,), error=StorageError("The server is away.")))
    assert read_record(specs[0]) is None


def test_a_failure_does_not_hide_the_video_of_another_job(make_pipeline: Any, tmp_path: Path) -> None:
    [spec] = specs_in(tmp_path, 1)
    [record] = generate_batch(make_pipeline(), [spec], [1])
    assert record_failure(spec, "ValueError", "x", 1) == record
    assert read_record(spec) == record


def test_a_failed_video_keeps_its_reason_when_the_process_crashes_later(tmp_path: Path) -> None:
    specs = specs_in(tmp_path, 2)
    failed = made(specs, Maker(bad=(0,), error=ValueError("no such class")))["id0"]
    again = made(specs, Maker(), id0=Attempts(failed.attempts, 2), id1=Attempts(2, 1))["id0"]
    assert again == failed == read_record(specs[0])
