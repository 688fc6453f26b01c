"""The S3 server that other tests stand on keeps what it stores over a restart, and knows who may do what."""

import pytest
from botocore.exceptions import ClientError
from s3_server import S3Server


def test_the_server_checks_rights_and_keeps_its_objects() -> None:
    with S3Server() as server:
        writer, reader, bucket = server.client(), server.client("reader"), server.make_bucket()
        writer.put_object(Bucket=bucket, Key="a b/é", Body=b"data")
        with pytest.raises(ClientError, match="AccessDenied"):
            reader.get_object(Bucket=bucket, Key="a b/é")
        server.grant_reading(bucket)
        with pytest.raises(ClientError, match="AccessDenied"):
            reader.put_object(Bucket=bucket, Key="c", Body=b"")
        endpoint = server.endpoint
        server.stop()
        server.start()
        assert server.endpoint == endpoint
        assert reader.get_object(Bucket=bucket, Key="a b/é")["Body"].read() == b"data"
        root = server.root
    assert not root.exists()
