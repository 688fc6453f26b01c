"""The storage section reaches the workers of a cluster that was started without it."""

import broken_videos
import pytest
from clusters import Cluster
from s3_server import S3Server, environment

from ardiff.data import storage
from ardiff.data.error_log import read_errors
from ardiff.data.manifest import read_manifest

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_the_endpoint_of_the_configuration_reaches_another_node(s3_server: S3Server, s3_bucket: str) -> None:
    for name in ("train/a.mp4", "train/b.mp4", "test/c.mp4"):
        storage.write_bytes(f"{s3_bucket}/videos/{name}", broken_videos.encode())
    storage.write_bytes(f"{s3_bucket}/videos/train/bad.mp4", b"")
    variables = s3_server.environment()
    endpoint = variables.pop("AWS_ENDPOINT_URL")
    with environment(variables):
        cluster = Cluster(head_cpus=3)
    try:
        command = ["prepare", f"{s3_bucket}/videos", f"{s3_bucket}/data", f"storage.endpoint={endpoint}"]
        result = cluster.run(*command, "storage.retry_seconds=5")
        assert result.code == 0, result.err
    finally:
        cluster.close()
    records = read_manifest(f"{s3_bucket}/data/manifest.parquet")
    assert [r.status for r in records] == ["ok", "ok", "ok", "error"]  # test/c, train/a, train/b, train/bad
    assert [row.error for row in read_errors(f"{s3_bucket}/data/errors.parquet")] == ["empty"]
