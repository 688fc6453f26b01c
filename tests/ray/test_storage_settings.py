"""The storage section reaches the workers of a cluster that was started without it."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import broken_videos
import pytest
from s3_server import S3Server

from ardiff.data import storage
from ardiff.data.error_log import read_errors
from ardiff.data.manifest import read_manifest

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_the_endpoint_of_the_configuration_reaches_another_node(
    jobs: Any, s3_server: S3Server, s3_bucket: str, tmp_path: Path
) -> None:
    for name in ("train/a.mp4", "train/b.mp4", "test/c.mp4"):
        storage.write_bytes(f"{s3_bucket}/videos/{name}", broken_videos.encode())
    storage.write_bytes(f"{s3_bucket}/videos/train/bad.mp4", b"")
    with socket.socket() as free:
        free.bind(("127.0.0.2", 0))
        port = free.getsockname()[1]
    variables = s3_server.environment()
    endpoint = variables.pop("AWS_ENDPOINT_URL")
    nodes = {k: v for k, v in jobs.environment.items() if not k.startswith("AWS_")} | variables
    nodes |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"]
    ray += ["--node-ip-address=127.0.0.2", "--num-cpus=3", "--include-dashboard=false", "--disable-usage-stats"]
    ray += ["--object-store-memory=200000000", f"--temp-dir={jobs.ray_folder}/head"]
    head = subprocess.Popen(
        ray, env=nodes, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.2", port)) == 0:
                    break
            time.sleep(0.5)
        jobs.environment = {**nodes, "RAY_ADDRESS": f"127.0.0.2:{port}"}
        command = ["prepare", f"{s3_bucket}/videos", f"{s3_bucket}/data", f"storage.endpoint={endpoint}"]
        result = jobs.run(*command, "storage.retry_seconds=5")
        assert result.code == 0, result.err
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait(60)
    records = read_manifest(f"{s3_bucket}/data/manifest.parquet")
    assert [r.status for r in records] == ["ok", "ok", "ok", "error"]  # test/c, train/a, train/b, train/bad
    assert [row.error for row in read_errors(f"{s3_bucket}/data/errors.parquet")] == ["empty"]
