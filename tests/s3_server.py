"""A real S3 server for tests: OpenStack Swift, in its own process and its own virtual environment.

It checks signatures, keeps its objects over a restart, lists more than a thousand keys, and supports ranges and
multipart uploads. It stores about 70 objects a second, so a test should store hundreds, not thousands.
"""

import contextlib
import os
import re
import secrets
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from ports import free_ports

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv-s3" / "bin" / "python"
LAUNCHER = Path(__file__).with_name("s3") / "launch.py"


class S3Server:
    """``with S3Server() as server``: an S3 endpoint on a free port of 127.0.0.1, with a temporary folder."""

    def __init__(self) -> None:
        if not PYTHON.exists():
            raise RuntimeError("There is no .venv-s3 with the S3 server of the tests: run `make s3-server`.")
        # Swift keeps extended attributes on its files, which a tmpfs may lack.
        self.root = Path(tempfile.mkdtemp(prefix="s3-", dir=os.environ.get("ARDIFF_TEST_DISK", "/var/tmp")))
        self.secret = secrets.token_hex(8)
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "S3Server":
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def endpoint(self) -> str:
        """The URL for clients."""
        return f"http://127.0.0.1:{self.port}"

    def environment(self, user: str = "writer", secret: str | None = None) -> dict[str, str]:
        """The AWS variables of a user, ``writer`` or ``reader``; ``secret`` gives a wrong one."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": f"ardiff:{user}",
            "AWS_SECRET_ACCESS_KEY": secret or self.secret,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }

    def client(self, user: str = "writer") -> Any:
        """A boto3 client, independent of the code under test."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=f"ardiff:{user}",
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
            config=Config(
                s3={"addressing_style": "path"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def make_bucket(self, name: str | None = None) -> str:
        """Creates a bucket, by default with a new name. Returns the name."""
        name = name or f"test-{secrets.token_hex(6)}"
        self.client().create_bucket(Bucket=name)
        return name

    def requests(self, bucket: str) -> list[tuple[str, str]]:
        """Method and key (with the query) of every request to a bucket so far. The key of a listing is empty."""
        lines = (self.root / "requests.log").read_text().splitlines()
        found = [re.fullmatch(rf"(\w+) /{re.escape(bucket)}(?:/|(?=\?))(.*)", line) for line in lines]
        return [(match[1], match[2].removesuffix("?")) for match in found if match]

    def grant_reading(self, bucket: str) -> None:
        """Lets the user ``reader`` get and list the objects of ``bucket``, and nothing else."""
        # For Swift the bucket is public, but it answers only requests with a known user's signature.
        self.client().put_bucket_acl(Bucket=bucket, ACL="public-read")

    def start(self, patience: float = 90.0) -> None:
        """Starts the server and waits until it answers. A restart keeps the port."""
        for attempt in range(3):
            port = self.port or free_ports(4)
            self.process = subprocess.Popen(
                [str(PYTHON), str(LAUNCHER), str(self.root), str(port), self.secret],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            assert self.process.stdout is not None
            line = _read_line(self.process, patience)
            if line == "READY":
                self.port = port
                return
            self.stop()
            if attempt == 2:
                raise RuntimeError(f"The S3 server did not start: {line or 'no answer'}")
            time.sleep(1)  # another process may hold the port for a moment

    def start_after(self, seconds: float) -> Future[None]:
        """Starts the server after some seconds, in a thread. The result raises if that failed."""

        def start() -> None:
            time.sleep(seconds)
            self.start()

        return ThreadPoolExecutor(1).submit(start)

    def stop(self) -> None:
        """Stops the server and its children. Stored objects stay."""
        process, self.process = self.process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def close(self) -> None:
        """Stops the server and deletes all objects."""
        self.stop()
        shutil.rmtree(self.root, ignore_errors=True)


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets environment variables for as long as the block lasts, and unsets all others that begin with ``AWS_``.

    Other variables that change inside the block keep their new values.
    """
    changed = {name for name in os.environ if name.startswith("AWS_")} | variables.keys()
    before = {name: os.environ.pop(name) for name in changed if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in [name for name in os.environ if name in variables or name.startswith("AWS_")]:
            del os.environ[name]
        os.environ.update(before)


def _read_line(process: "subprocess.Popen[bytes]", patience: float) -> str:
    """The first line of the process's output; empty if it ends or ``patience`` seconds pass before."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], patience)
    return process.stdout.readline().decode().strip() if ready else ""
