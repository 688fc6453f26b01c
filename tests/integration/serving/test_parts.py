"""Modules of the service: video fragments, uploads, keys, and the configuration for Ray Serve."""

import asyncio
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
import yaml
from filtered_videos import HEIGHT, INTERLACED_FRAMES, WIDTH, hdr, interlaced
from PIL import Image

from ardiff.cli import main
from ardiff.data.decode import decode_clip
from ardiff.data.encode import VideoCodec, encode_video
from ardiff.errors import ConfigError, DataError
from ardiff.resolution import Resolution
from ardiff.serving.admission import UploadDecoder
from ardiff.serving.config import ServiceConfig
from ardiff.serving.fragments import FragmentWriter, as_file
from ardiff.serving.hls import split
from ardiff.serving.keys import RateLimiter, digest, find_owner, read_keys
from ardiff.serving.metrics import PrometheusRecorder
from ardiff.serving.replica import Replica
from ardiff.serving.uploads import decode_upload
from ray_jobs.serve import application
from ray_jobs.serving.lint import lint

LIMITS: dict[str, Any] = {
    "resolution": Resolution.square(16),
    "max_frames": 8,
    "max_pixels": 2**20,
    "seconds": 5.0,
    "memory_bytes": 2 * 2**30,
}


def decoded(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data), "r") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("codec", ["h264", "vp9", "av1"])
def test_fragments_come_frame_by_frame_and_make_a_file(codec: VideoCodec) -> None:
    frames = np.zeros((6, 17, 20, 3), np.uint8)
    for i, frame in enumerate(frames):
        frame[:, 3 * i : 3 * i + 3] = 40 * i + 20
    writer = FragmentWriter(17, 20, fps=8, codec=codec, crf=8)
    parts = [writer.start(), *(writer.add(frame) for frame in frames), writer.finish()]
    assert len(parts[0]) > 100
    kind = "video/webm" if codec == "vp9" else "video/mp4"
    assert writer.media_type.startswith(f'{kind}; codecs="{ {"h264": "avc1.", "vp9": "vp9", "av1": "av01"}[codec] }')
    for count in range(1, 7):  # a frame's bytes are there with the frame
        assert len(decoded(b"".join(parts[: count + 1]))) == count
    streamed = b"".join(parts)
    for data in (streamed, as_file(streamed)):
        video = decoded(data)
        assert video.shape == (6, 18, 20, 3)
        assert np.abs(video[:, :17].astype(int) - frames).mean() < 12
    if codec != "vp9":
        assert as_file(streamed).index(b"moov") < as_file(streamed).index(b"mdat")


def test_uploads_are_scaled_and_cropped() -> None:
    picture = Image.new("RGBA", (40, 20), (200, 10, 10, 255))
    for kind in ("PNG", "WEBP"):
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        frames = asyncio.run(decode_upload(buffer.getvalue(), **LIMITS))
        assert frames.shape == (1, 16, 16, 3)
        assert np.abs(frames.reshape(-1, 3).mean(0) - [200, 10, 10]).max() < 8
    clip = encode_video(np.full((5, 24, 32, 3), 90, np.uint8), 8)
    assert asyncio.run(decode_upload(clip, **LIMITS)).shape == (5, 16, 16, 3)
    wide = {**LIMITS, "resolution": Resolution(16, 40)}
    for upload, count in ((clip, 5), (buffer.getvalue(), 1)):
        assert asyncio.run(decode_upload(upload, **wide)).shape == (count, 16, 40, 3)


def test_uploads_are_deinterlaced_and_tone_mapped_if_the_service_does(tmp_path: Path) -> None:
    wide = {**LIMITS, "resolution": Resolution(HEIGHT, WIDTH), "max_frames": INTERLACED_FRAMES}
    hdr_clip = hdr(np.full((16, 3), 0.58), 16)
    for upload, modes, filters in (
        (interlaced(), ("auto", "off"), ["deinterlace"]),
        (hdr_clip, ("off", "auto"), ["tone_map"]),
        (interlaced(), ("off", "auto"), []),
    ):
        frames = asyncio.run(decode_upload(upload, **wide, filters=modes))
        expected = decode_clip(upload, 0, len(frames), resolution=wide["resolution"], filters=filters)
        assert np.array_equal(frames, expected)
    for modes, brightness in ((("off", "auto"), 232), (("off", "off"), 148)):
        config = ServiceConfig(storage=str(tmp_path), deinterlace=modes[0], tone_map=modes[1])
        frames = asyncio.run(UploadDecoder(config).decode(hdr_clip, Resolution.square(16)))
        assert np.abs(frames.astype(int) - brightness).max() < 4


def huge_picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (6000, 6000)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "limits", "reason"),
    [
        (b"", {}, "it is empty"),
        (b"GIF89a" + b"\0" * 50, {}, "it is a GIF, which is not supported: send a PNG"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 100, {}, "cannot be decoded"),
        (b"#EXTM3U\nfile:///etc/passwd\n", {}, "cannot be decoded"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", {}, "cannot be decoded"),
        (encode_video(np.zeros((9, 16, 16, 3), np.uint8), 8), {}, "more than the 8 allowed"),
        (huge_picture(), {}, "beyond the limit of 1048576 pixels"),
        (huge_picture(), {"max_pixels": 10**9, "memory_bytes": 400 * 2**20}, "memory"),
    ],
)
def test_unusable_uploads_are_rejected(data: bytes, limits: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        asyncio.run(decode_upload(data, **{**LIMITS, **limits}))


def test_an_upload_that_takes_too_long_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ardiff.serving.uploads.START_SECONDS", 0.0)
    before = psutil.Process().children()
    with pytest.raises(DataError, match=r"takes more than 0\.01 s"):
        asyncio.run(decode_upload(b"", **{**LIMITS, "seconds": 0.01}))
    assert psutil.Process().children() == before


def test_keys_are_hashes_and_have_owners(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["api-key", "alice"]) == 0
    text = capsys.readouterr().out
    key = text.splitlines()[0].split()[-1]
    (tmp_path / "keys.yaml").write_text(text)
    keys = read_keys(str(tmp_path / "keys.yaml"))
    assert key not in (tmp_path / "keys.yaml").read_text().replace(f": {key}", "")
    assert keys["alice"].sha256 == digest(key)
    assert find_owner(keys, key) == "alice"
    assert find_owner(keys, key + "x") is None
    for bad in ("alice", "{'../x': {sha256: a}}", "{a: {sha256: abc}}", "{a: {shA256: abc}}", "[", "{a: 1}"):
        (tmp_path / "bad.yaml").write_text(bad)
        with pytest.raises(ConfigError):
            read_keys(str(tmp_path / "bad.yaml"))
    assert main(["api-key", "../alice"]) == 2


def test_a_rate_limit_refills_evenly() -> None:
    now = 0.0
    limiter = RateLimiter(clock=lambda: now)
    assert [limiter.wait("a", 3) for _ in range(3)] == [0, 0, 0]
    assert limiter.wait("a", 3) == pytest.approx(20)
    assert limiter.wait("b", 3) == 0
    now = 20.0
    assert limiter.wait("a", 3) == 0
    assert limiter.wait("a", 3) > 0


def test_the_process_that_decodes_uploads_starts_light() -> None:
    heavy = "{'torch', 'boto3', 'botocore', 'pyarrow', 'pandas', 'fastapi'}"
    code = f"import sys, ardiff.serving.uploads; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_rejections_by_serve_itself_have_a_retry_after(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    app = application({"checkpoint": str(tmp_path), "device": "cpu"})
    backpressure = app._bound_deployment.backpressure_config
    assert (backpressure.status_code, backpressure.retry_after_s) == (503, 5)


CONFIGURATION = Path(__file__).parents[3] / "cluster" / "overlays" / "aws" / "serve_config.yaml"


def test_the_shipped_serve_configuration_is_valid(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint-serve", str(CONFIGURATION)]) == 0
    assert "is valid" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("http_optoins", {}, "did you mean 'http_options'"),
        ("applications.0.arguments", {}, "Unknown key 'applications\\[0\\].arguments'"),
        ("applications.0.args.service.max_wating", 3, "max_waiting"),
        ("applications.0.args.models", {}, "no model to serve"),
        ("applications.0.args.service.keys", None, "give keys"),
        ("applications.0.import_path", "x:y", "No application has import_path"),
        ("applications.0.deployments.0.name", "Server", "its name is VideoServer"),
        ("applications.0.deployments.0.graceful_shutdown_timeout_s", 20, "at least 320"),
        ("applications.0.deployments.0.max_queued_requests", 10, "at least 64"),
        ("applications.0.deployments.0.autoscaling_config.max_replica", 3, "did you mean 'max_replicas'"),
        ("applications.0.deployments.0.autoscaling_config.min_replicas", 9, "below min_replicas|min_replicas"),
        ("applications.0.deployments.0.autoscaling_config.min_replicas", 0, "at least 1"),
        ("applications.0.args.service.storage", "runs/serve", "all replicas share"),
        ("applications.0.args.service", {"storage": "s3://a/b", "allow_anonymous": True}, "cannot hold the database"),
        (
            "applications.0.args.service",
            {"storage": "/a", "database": "b", "allow_anonymous": True},
            "several machines",
        ),
        ("applications.0.args.service.database", "/data/jobs.sqlite", "database_password is for PostgreSQL only"),
        ("applications.0.args.service.database", "mysql://a/b", "the path of a SQLite file, or postgresql://"),
        ("applications.0.args.service.database", "postgresql://a:secret@b/c", "holds a password"),
        ("applications.0.args.service.database", "postgresql://a@b/c?password=secret", "holds a password"),
        ("applications.0.args.service.database", "postgresql://a@b:port/c", "postgresql://USER@HOST:PORT/NAME"),
        ("values", {}, "Unknown key 'values'"),
    ],
)
def test_mistakes_that_serve_ignores_are_reported(path: str, value: Any, reason: str, tmp_path: Path) -> None:
    tree: Any = yaml.safe_load(CONFIGURATION.read_text())
    *parents, last = path.split(".")
    place = tree
    for parent in parents:
        place = place[int(parent)] if isinstance(place, list) else place[parent]
    place[last] = value
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=reason):
        lint(tmp_path / "serve.yaml")


def test_a_model_that_the_engine_cannot_sample_is_not_served(make_pipeline: Any, tmp_path: Path) -> None:
    pipelines = {"tiny": make_pipeline(), "both": make_pipeline(attention="bidirectional")}
    with pytest.raises(ConfigError, match=r"The model both cannot be served: .*mode=full"):
        Replica(pipelines, ServiceConfig(storage=str(tmp_path)), PrometheusRecorder(), "a")


@pytest.mark.parametrize("ended", [True, False])
def test_a_stream_without_frames_has_no_segments(ended: bool) -> None:
    assert split(lambda start, length: b"", 0, ended) == (0, [])


def test_a_poll_that_is_cancelled_as_the_queue_changes_ends(make_pipeline: Any, tmp_path: Path) -> None:
    async def cancel() -> bool:
        replica = Replica({"tiny": make_pipeline()}, ServiceConfig(storage=str(tmp_path)), PrometheusRecorder(), "a")
        polling = asyncio.create_task(replica.queue.changed(60.0))
        await asyncio.sleep(0.01)  # it waits
        replica.queue.notify()
        polling.cancel()
        await asyncio.wait([polling])
        return polling.cancelled()

    assert asyncio.run(cancel())
