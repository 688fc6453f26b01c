"""``prepare`` and ``encode`` from bucket to bucket, on a real S3 server, with bad files and a server that stops."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import broken_videos
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from jobs import Result
from s3_server import S3Server, environment

from ardiff.cli import main
from ardiff.data import storage
from ardiff.data.decode import decode_clip
from ardiff.data.error_log import read_errors
from ardiff.data.latents import LatentStatistics, read_description, read_keys, read_latents, vae_fingerprint
from ardiff.data.manifest import read_manifest, write_manifest
from ardiff.data.transforms import to_unit
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.pretrained import save_autoencoder
from ardiff.resolution import Resolution
from ray_jobs import prepare

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def server(cluster: None, s3_server: S3Server) -> Iterator[S3Server]:
    """The S3 server of the tests. This process and the workers of the cluster reach it."""
    with environment(s3_server.environment()):
        yield s3_server


@pytest.fixture(scope="module")
def bucket(server: S3Server) -> str:
    return f"s3://{server.make_bucket()}"


Command = Callable[..., Result]


@pytest.fixture(scope="module")
def corpus(bucket: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bucket with good and bad files."""
    folder = tmp_path_factory.mktemp("corpus")
    broken_videos.write(folder)
    storage.upload_folder(folder, f"{bucket}/corpus")
    return f"{bucket}/corpus"


@pytest.fixture(scope="module")
def prepared(corpus: str, bucket: str) -> str:
    assert main(["prepare", corpus, f"{bucket}/data", "max_bad_fraction=0.6"]) == 0
    return f"{bucket}/data"


def test_every_file_has_a_row_and_every_bad_one_its_reason(corpus: str, prepared: str) -> None:
    records = {r.uri.removeprefix(f"{corpus}/"): r for r in read_manifest(f"{prepared}/manifest.parquet")}
    bad = {name.split("/1.png")[0].split("/2.png")[0]: kind for name, (_, kind) in broken_videos.broken().items()}
    bad["frames with a hole/"] = bad.pop("frames with a hole")
    odd = broken_videos.odd()
    assert set(records) == {*bad, *odd, "frames/"}
    assert {name: records[name].error for name in bad} == bad
    errors = {row.uri.removeprefix(f"{corpus}/"): row for row in read_errors(f"{prepared}/errors.parquet")}
    assert {name: (row.error, row.clip, row.attempts) for name, row in errors.items()} == {
        name: (kind, -1, 1) for name, kind in bad.items()
    }
    assert all(row.message for row in errors.values())
    for name, (_, facts) in odd.items():
        r = records[name]
        assert (r.num_frames, r.width, r.height, r.rotation) == facts, name
        assert (r.status, r.error, r.reason) == ("ok", "", "")
    frames = records["frames/"]
    assert (frames.codec, frames.num_frames, frames.width, frames.height, frames.fps) == ("jpeg", 12, 64, 48, 25.0)
    assert storage.read_bytes(f"{prepared}/sheet.png").startswith(b"\x89PNG")


def test_a_second_run_probes_only_what_is_new_or_changed(
    ardiff: Command, corpus: str, prepared: str, server: S3Server
) -> None:
    before = read_manifest(f"{prepared}/manifest.parquet")
    said = ardiff("prepare", corpus, prepared, "max_bad_fraction=0.6").expect(0)
    assert f"0 videos are new or changed, {len(before)} are known, 0 are gone" in said
    assert read_manifest(f"{prepared}/manifest.parquet") == before

    storage.write_bytes(f"{corpus}/words.mp4", broken_videos.encode(frames=9))
    storage.write_bytes(f"{corpus}/new.mp4", broken_videos.encode(frames=7))
    storage.write_bytes(f"{corpus}/frames/12.jpg", broken_videos.still(12, "JPEG"))
    storage.delete_file(f"{corpus}/zero bytes.mp4")
    try:
        said = ardiff("prepare", corpus, prepared, "max_bad_fraction=0.6").expect(0)
        assert f"3 videos are new or changed, {len(before) - 3} are known, 1 are gone" in said
        after = {r.uri: r for r in read_manifest(f"{prepared}/manifest.parquet")}
        counts = [after[f"{corpus}/{name}"].num_frames for name in ("words.mp4", "new.mp4", "frames/")]
        assert counts == [9, 7, 13]
        same = [r for r in before if r.uri in after and not r.uri.endswith(("words.mp4", "frames/"))]
        assert [after[r.uri] for r in same] == same
    finally:
        storage.write_bytes(f"{corpus}/words.mp4", broken_videos.broken()["words.mp4"][0])
        storage.write_bytes(f"{corpus}/zero bytes.mp4", b"")
        storage.delete_file(f"{corpus}/new.mp4")
        storage.delete_file(f"{corpus}/frames/12.jpg")
        ardiff("prepare", corpus, prepared, "max_bad_fraction=0.6").expect(0)


def test_too_many_bad_files_fail_and_the_errors_that_dominate_are_named(
    ardiff: Command, corpus: str, bucket: str
) -> None:
    said = ardiff("prepare", corpus, f"{bucket}/strict", "max_bad_fraction=0.1").expect(1)
    assert "8 of 16 videos are bad (50.0%), more than max_bad_fraction=0.1 allows: 2 truncated (" in said
    assert len(read_errors(f"{bucket}/strict/errors.parquet")) == 8
    assert not storage.exists(f"{bucket}/strict/stage.json")


def test_a_wrong_secret_ends_the_job_with_one_sentence(
    ardiff: Command, server: S3Server, corpus: str, bucket: str
) -> None:
    with environment(server.environment(secret="wrong")):
        said = ardiff("prepare", corpus, f"{bucket}/refused").expect(1)
    [line] = [line for line in said.splitlines() if line.startswith("ardiff: ")]
    assert "SignatureDoesNotMatch" in line
    assert "Check the bucket, the credentials and AWS_ENDPOINT_URL" in line
    assert "Traceback" not in said


def test_a_job_waits_for_a_server_that_went_away(
    ardiff: Command, server: S3Server, corpus: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server stops after the job has listed the files and before it probes them, and starts again seconds later."""
    original, restarts = prepare.remote_progress, []

    @contextlib.contextmanager
    def stopping(*arguments: Any) -> Iterator[Any]:
        if not restarts:
            server.stop()
            restarts.append(server.start_after(4.0))
        with original(*arguments) as progress:
            yield progress

    monkeypatch.setattr(prepare, "remote_progress", stopping)
    try:
        ardiff("prepare", corpus, f"{bucket}/patient", "max_bad_fraction=0.6").expect(0)
    finally:
        restarts[0].result()
    names = [(r.uri, r.status, r.error, r.num_frames) for r in read_manifest(f"{bucket}/patient/manifest.parquet")]
    assert len(names) == 16
    assert sum(status == "ok" for _, status, _, _ in names) == 8


# Latents


def latents_of(folder: str) -> dict[tuple[str, int, bool], np.ndarray]:
    """All clips of a complete set by URI, start and mirroring."""
    description, found = read_description(folder), {}
    for file, rows in zip(description.files, description.rows, strict=True):
        shape = (description.num_frames, description.num_tokens, description.token_dim)
        latents, _ = read_latents(f"{folder}/{file}", shape)
        keys = read_keys(f"{folder}/{file}")
        assert len(keys) == len(latents) == rows
        found |= {(k.uri, k.start, k.mirrored): z for k, z in zip(keys, latents, strict=True)}
    assert len(found) == sum(description.rows)
    assert sorted(description.files) == [f.rpartition("/")[2] for f in storage.list_files(folder, (".parquet",))]
    firsts = [read_keys(storage.join(folder, file))[0] for file in description.files]
    assert firsts == sorted(firsts, key=lambda key: (key.uri, key.start))  # not that of names, which hold places
    return found


def test_only_missing_clips_are_encoded(
    ardiff: Command, bucket: str, prepared: str, make_vae: Any, tmp_path: Path
) -> None:
    vae, output, manifest = make_vae(), f"{bucket}/latents", f"{prepared}/manifest.parquet"
    save_autoencoder(f"{bucket}/vae", vae)
    command = ["encode", f"manifest={manifest}", f"vae={bucket}/vae", f"output={output}"]
    command += ["num_frames=4", "clip_step=8", "batch_size=4", "clips_per_file=5"]
    records = [r for r in read_manifest(manifest) if r.status == "ok" and r.split == "train"]
    expected = [(r.uri, start) for r in records for start in range(0, r.num_frames - 3, 8)]

    said = ardiff(*command).expect(0)
    assert f"{len(expected)} clips encoded, 0 were there" in said
    [place] = [f for f in storage.list_files(output) if f.endswith("latents.json")]
    folder = place.removesuffix("/latents.json")
    first = latents_of(folder)
    assert sorted(first) == sorted((uri, start, False) for uri, start in expected)
    plain = next(r for r in records if r.uri.endswith("ten bits.mp4"))
    clip = decode_clip(storage.read_bytes(plain.uri), 8, 4, resolution=Resolution.square(16))
    with torch.no_grad():
        z = vae.encode(to_unit(torch.from_numpy(clip[None]))).mean[0].numpy()
    np.testing.assert_allclose(first[plain.uri, 8, False], z, atol=1e-5)

    filesystem, path = storage.open_filesystem(f"{folder}/{read_description(folder).files[0]}")
    columns = pq.read_table(path, filesystem=filesystem).column_names
    assert columns == ["uri", "etag", "label", "start", "mirrored", "latents"]

    # With more clips, a lost file and a changed video, exactly what is missing is encoded.
    lost = storage.list_files(folder, (".parquet",))[0]
    gone = {(k.uri, k.start) for k in read_keys(lost)}
    storage.delete_file(lost)
    changed = [replace(r, etag="another") if r.uri == plain.uri else r for r in read_manifest(manifest)]
    write_manifest(f"{bucket}/changed.parquet", changed)
    gone |= {key for key in expected if key[0] == plain.uri}
    said = ardiff(*command, "offsets=[0,4]", "mirrored=true", f"manifest={bucket}/changed.parquet").expect(0)
    more = [(r.uri, start) for r in records for start in range(0, r.num_frames - 3, 4)]
    there = len(expected) - len(gone)
    assert f"{2 * len(more) - there} clips encoded, {there} were there" in said
    second = latents_of(folder)
    assert sorted(second) == sorted((uri, start, flip) for uri, start in more for flip in (False, True))
    assert all(np.allclose(second[key], z, atol=1e-5) for key, z in first.items())
    with torch.no_grad():
        z = vae.encode(to_unit(torch.from_numpy(clip[None, :, :, ::-1].copy()))).mean[0].numpy()
    np.testing.assert_allclose(second[plain.uri, 8, True], z, atol=1e-5)

    save_autoencoder(f"{tmp_path}/other", make_vae(seed=1))
    said = ardiff("train-dit", f"latents={folder}", f"data.vae={tmp_path}/other", f"output={tmp_path}/dit").expect(2)
    assert f"were made by the AR-VAE {vae_fingerprint(f'{bucket}/vae')} (" in said
    assert f"is the AR-VAE {vae_fingerprint(f'{tmp_path}/other')}" in said


def test_a_clip_that_is_damaged_is_left_out_and_the_others_of_the_video_are_kept(
    ardiff: Command, bucket: str, make_vae: Any
) -> None:
    """The packet of frame 9 is damaged. Key frames are 6 frames apart, so only the clips that need frame 9 are lost."""
    good = broken_videos.encode(bf=0)
    place = f"{bucket}/damaged/train/a.mp4"
    storage.write_bytes(place, good)
    for i in range(3):
        storage.write_bytes(f"{bucket}/damaged/train/{i}.mp4", broken_videos.encode(crf=20 + i))
    storage.write_bytes(f"{bucket}/damaged/test/b.mp4", good)
    ardiff("prepare", f"{bucket}/damaged", f"{bucket}/damaged-data").expect(0)
    storage.write_bytes(place, broken_videos.corrupted(good, 9))
    save_autoencoder(f"{bucket}/damaged-vae", make_vae())
    command = ["encode", f"manifest={bucket}/damaged-data/manifest.parquet", f"vae={bucket}/damaged-vae"]
    command += [f"output={bucket}/damaged-latents", "num_frames=3", "clip_step=3"]
    said = ardiff(*command, "max_bad_fraction=0.2").expect(0)
    errors = read_errors(f"{bucket}/damaged-latents/errors.parquet")
    assert [(row.uri, row.clip, row.error) for row in errors] == [(place, 9, "corrupt")]
    assert "1 bad clip in" in said
    [description] = [f for f in storage.list_files(f"{bucket}/damaged-latents") if f.endswith("latents.json")]
    keys = latents_of(description.removesuffix("/latents.json")).keys()
    assert sorted(start for uri, start, _ in keys if uri == place) == [0, 3, 6, 12, 15, 18, 21]


@pytest.mark.slow
def test_a_kill_loses_no_more_than_the_files_in_flight(
    jobs: Any, server: S3Server, bucket: str, make_vae: Any, tmp_path: Path
) -> None:
    for i in range(24):
        storage.write_bytes(f"{tmp_path}/videos/train/{i}.mp4", broken_videos.encode(crf=10 + i, frames=64))
    storage.write_bytes(f"{tmp_path}/videos/test/b.mp4", broken_videos.encode())
    jobs.environment.update(server.environment())
    assert jobs.run("prepare", f"{tmp_path}/videos", f"{tmp_path}/data").code == 0
    save_autoencoder(f"{tmp_path}/vae", make_vae(width=64, depth=6))
    command = [f"manifest={tmp_path}/data/manifest.parquet", f"vae={tmp_path}/vae", "num_frames=16", "clip_step=1"]
    command += ["batch_size=2", "clips_per_file=16"]
    total = 24 * 49
    process = jobs.start("encode", *command, f"output={bucket}/killed")
    deadline = threading.Event()
    threading.Timer(180.0, deadline.set).start()
    while not deadline.wait(0.2):
        assert process.poll() is None, "it ended before it could be killed"
        if storage.exists(f"{bucket}/killed") and storage.list_files(f"{bucket}/killed", (".parquet",)):
            break
    assert jobs.kill(process).code == -9
    jobs.left_over()
    files = storage.list_files(f"{bucket}/killed", (".parquet",))
    kept = sum(len(read_keys(file)) for file in files)  # every visible file is whole
    assert 0 < kept < total
    assert not [f for f in storage.list_files(f"{bucket}/killed") if f.endswith("latents.json")]

    result = jobs.run("encode", *command, f"output={bucket}/killed")
    assert f"{total - kept} clips encoded, {kept} were there" in result.err
    assert jobs.run("encode", *command, f"output={tmp_path}/whole").code == 0
    sets = []
    for root in (f"{bucket}/killed", f"{tmp_path}/whole"):
        [place] = [f for f in storage.list_files(root) if f.endswith("latents.json")]
        sets.append(latents_of(place.removesuffix("/latents.json")))
    assert sets[0].keys() == sets[1].keys()
    assert all(np.allclose(z, sets[1][key], atol=1e-5) for key, z in sets[0].items())


@pytest.mark.slow
def test_the_dit_trains_on_clips(ardiff: Command, cluster: None, make_vae: Any, tmp_path: Path) -> None:
    """On videos, one of which is missing, and on latents of the same AR-VAE with the same settings."""
    for i in range(24):
        storage.write_bytes(f"{tmp_path}/videos/train/{i}.mp4", broken_videos.encode(crf=10 + i))
    storage.write_bytes(f"{tmp_path}/videos/test/b.mp4", broken_videos.encode())
    ardiff("prepare", f"{tmp_path}/videos", f"{tmp_path}/data").expect(0)
    (tmp_path / "videos" / "train" / "7.mp4").unlink()
    save_autoencoder(f"{tmp_path}/vae", make_vae())
    manifest = f"{tmp_path}/data/manifest.parquet"
    sizes = {
        "num_frames": 8,
        "num_tokens": 2,
        "token_dim": 4,
        "width": 32,
        "depth": 1,
        "num_heads": 2,
        "num_classes": 0,
    }
    command = [
        "train-dit",
        f"data.vae={tmp_path}/vae",
        "train.num_steps=12",
        "train.batch_size=4",
        "train.cpu_threads=1",
    ]
    command += [f"dit.{name}={value}" for name, value in sizes.items()]
    clips = [
        "data.source=clips",
        f"data.clips.manifest={manifest}",
        "data.clips.num_frames=8",
        "data.statistics_clips=8",
    ]
    said = ardiff(*command, *clips, f"output={tmp_path}/strict", "data.clips.max_bad_fraction=0.01").expect(1)
    assert "1 of 24 videos are bad (4.2%), more than max_bad_fraction=0.01 allows: 1 unreadable" in said
    ardiff(*command, *clips, f"output={tmp_path}/clips").expect(0)
    [row] = {r.uri for r in read_errors(f"{tmp_path}/clips/errors.parquet")}
    assert row == f"{tmp_path}/videos/train/7.mp4"
    kept = json.loads((tmp_path / "clips" / "statistics.json").read_text())
    statistics = LatentStatistics(kept["mean"], kept["std"])
    pipeline = ARDiffusionPipeline.from_pretrained(f"{tmp_path}/clips/pipeline")
    assert pipeline.statistics == statistics

    encode = ["encode", f"manifest={manifest}", f"vae={tmp_path}/vae", "num_frames=8", f"output={tmp_path}/latents"]
    ardiff(*encode).expect(0)
    [place] = tmp_path.glob("latents/*/latents.json")
    ardiff(*command, f"latents={place.parent}", f"output={tmp_path}/latent-dit").expect(0)
