import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ardiff.data import storage
from ardiff.errors import DataError
from ardiff.resolution import Resolution
from ardiff.sampling.params import FrameCondition, SamplingParams
from ardiff.sweep.manifest import read_manifest, video_record, write_manifest
from ardiff.sweep.specs import Record, VideoSpec, find_complete, read_complete, read_record, spec_id, write_record


def make_video_spec(folder: str, number: int = 0, latents: bool = False, **sampling: Any) -> VideoSpec:
    params = {"num_frames": 8, "ar_step": 2, "num_inference_steps": 4, "class_label": 1, "seed": number, **sampling}
    return VideoSpec(
        id=f"id{number}",
        point="point",
        checkpoint="/model",
        weights="f00d",
        precision="fp32",
        sampling=SamplingParams(**params),
        class_name="ring",
        fps=8.0,
        codec="h264",
        crf=8,
        uri=f"{folder}/videos/{number}.mp4",
        latents=f"{folder}/latents/{number}.safetensors" if latents else "",
        record=f"{folder}/records/{number}.json",
    )


def store(spec: VideoSpec, data: bytes = b"video") -> Record:
    """A spec as if it had been generated."""
    record = Record(
        id=spec.id, status="ok", file_size=len(data), latents_size=3 if spec.latents else 0, statistics={"a": [1.5]}
    )
    storage.write_bytes(spec.uri, data)
    if spec.latents:
        storage.write_bytes(spec.latents, b"xyz")
    write_record(spec, record)
    return record


def test_a_record_comes_back(tmp_path: Path) -> None:
    spec = make_video_spec(str(tmp_path))
    assert read_record(spec) is None
    record = store(spec)
    assert read_record(spec) == record
    assert json.loads(Path(spec.record).read_text())["spec"]["sampling"]["seed"] == 0


@pytest.mark.parametrize("latents", [False, True])
def test_complete_is_what_record_and_files_agree_on(tmp_path: Path, latents: bool) -> None:
    folder = str(tmp_path)
    assert find_complete([make_video_spec(folder)], f"{folder}/not-there") == {}
    specs = [make_video_spec(folder, number, latents) for number in range(7)]
    records = [store(spec) for spec in specs]
    assert find_complete(specs, folder) == {spec.id: record for spec, record in zip(specs, records, strict=True)}
    Path(specs[1].uri).unlink()  # gone
    Path(specs[2].uri).write_bytes(b"vid")  # cut off
    Path(specs[3].record).write_text('{"record": {"id"')  # half a record
    write_record(specs[4], replace(records[4], status="failed"))
    write_record(specs[5], replace(records[5], id="another"))
    if latents:
        Path(specs[6].latents).write_bytes(b"")
    left = {"id0"} if latents else {"id0", "id6"}
    assert find_complete(specs, folder).keys() == left
    assert {spec.id for spec in specs if read_complete(spec) is not None} == left


def test_a_spec_with_latents_is_not_complete_without_them(tmp_path: Path) -> None:
    store(make_video_spec(str(tmp_path)))
    assert find_complete([make_video_spec(str(tmp_path), latents=True)], str(tmp_path)) == {}


def test_the_manifest_has_a_row_for_every_spec(tmp_path: Path) -> None:
    specs = [make_video_spec(str(tmp_path), number) for number in range(3)]
    records = {spec.id: store(spec) for spec in specs[:2]}
    records["id1"] = Record(id="id1", status="failed", error="ValueError", message="no such class", attempts=2)
    write_manifest(str(tmp_path / "m.parquet"), specs, records)
    lines = read_manifest(str(tmp_path / "m.parquet"))
    assert [(line["id"], line["status"], line["error"]) for line in lines] == [
        ("id0", "ok", ""),
        ("id1", "failed", "ValueError"),
        ("id2", "missing", ""),
    ]
    assert lines[0]["statistics"] == {"a": [1.5]}
    assert (lines[1]["message"], lines[1]["attempts"], lines[1]["uri"]) == ("no such class", 2, specs[1].uri)


def test_every_sampling_parameter_is_a_column(tmp_path: Path) -> None:
    changes = (FrameCondition(frame=3, prompt="a ring"), FrameCondition(frame=5, guidance_scale=2.0))
    specs = [
        make_video_spec(str(tmp_path), 0, conditions=changes, prompt="a disc"),
        make_video_spec(str(tmp_path), 1, class_label=None, mode="full"),
    ]
    write_manifest(str(tmp_path / "m.parquet"), specs, {})
    rows = read_manifest(str(tmp_path / "m.parquet"))
    names = [f.name for f in fields(SamplingParams)]
    assert [SamplingParams.from_dict({n: row[n] for n in names}) for row in rows] == [s.sampling for s in specs]
    assert set(names) <= set(pq.read_schema(tmp_path / "m.parquet").names)


def test_a_dict_comes_back_as_the_spec(tmp_path: Path) -> None:
    spec = make_video_spec(str(tmp_path), guidance_scale=2.0, conditions=(FrameCondition(frame=3, prompt="a ring"),))
    assert VideoSpec.from_dict(asdict(spec)) == VideoSpec.from_dict(json.loads(json.dumps(asdict(spec)))) == spec


def test_ids_depend_on_everything_that_frames_depend_on() -> None:
    params = SamplingParams(num_frames=8, ar_step=2, seed=3)
    ids = {spec_id("f00d", params, "fp32"), spec_id("beef", params, "fp32"), spec_id("f00d", params, "bf16")}
    assert len(ids) == 3
    changes = {"mode": "full", "class_label": 7, "solver": "unipc", "timestep_spacing": "trailing"}
    for field in fields(SamplingParams):
        other = replace(params, **{field.name: changes.get(field.name, 77)})
        assert spec_id("f00d", other, "fp32") not in ids, field.name


def test_ids_stay_what_they_are() -> None:
    """Defaults are left out of ids, so a new parameter keeps them. No default may ever change, nor what None stands
    for."""
    defaults = {f.name: f.default for f in fields(SamplingParams)}
    expected = {"num_frames": 16, "num_inference_steps": None, "ar_step": None, "guidance_scale": 1.0, "mode": "window"}
    assert defaults.items() >= {**expected, "class_label": None, "seed": 0, "given_frames": 0}.items()
    for same in (SamplingParams(), SamplingParams(num_inference_steps=50, solver="ddim")):
        assert spec_id("f00d", same, "fp32") == "24dae1f32bf23e31"
    params = SamplingParams(num_frames=128, ar_step=5, guidance_scale=2.0, mode="rolling", class_label=1, seed=9)
    assert spec_id("f00d", params, "bf16") == "919e91551888f14e"


def test_other_files_are_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "m.parquet").write_bytes(b"no table")
    for place in ("m.parquet", "missing.parquet"):
        with pytest.raises(DataError, match="ardiff sweep"):
            read_manifest(str(tmp_path / place))


def test_a_spec_is_a_row_of_an_evaluation(tmp_path: Path) -> None:
    spec = replace(make_video_spec(str(tmp_path), class_label=None), class_name="")
    record = video_record(spec, store(spec), Resolution(16, 24))
    assert (record.uri, record.size, record.codec, record.num_frames) == (spec.uri, 5, "h264", 8)
    assert (record.height, record.width) == (16, 24)
    assert (record.label, record.class_name, record.split, record.status) == (0, "video", "test", "ok")
