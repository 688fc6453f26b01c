"""``ardiff doctor``: one line per finding, and an exit code that says whether the quickstart can run."""

import re
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from ardiff import doctor
from ardiff.cli import main

FINDINGS = [
    "python",
    "torch",
    "devices",
    "nvidia driver",
    "memory",
    "ray",
    "ray cluster",
    "libx264",
    "libvpx-vp9",
    "libsvtav1",
    "s3",
    "deepspeed",
    "deepspeed ops",
]


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ENDPOINT_URL", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


class Refusing(BaseHTTPRequestHandler):
    """A store whose policy does not let these credentials list buckets."""

    def do_GET(self) -> None:
        self.send_response(403)
        self.end_headers()
        self.wfile.write(b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")

    def log_message(self, *arguments: object) -> None: ...


def lines(text: str) -> dict[str, tuple[str, str]]:
    """Name to (mark, what was found)."""
    found = [re.fullmatch(r"(ok|MISSING) +(\S+(?: \S+)?) {2,}(.*)", line) for line in text.splitlines()]
    assert all(found), text
    return {match[2]: (match[1], match[3]) for match in found if match}


def test_every_finding_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor"])
    found = lines(capsys.readouterr().out)
    assert list(found) == FINDINGS
    assert code == (0 if all(mark == "ok" for mark, _ in found.values()) else 1)
    assert found["libx264"][0] == "ok"
    assert re.match(r"\d+\.\d+", found["ray"][1])
    assert "local paths only" in found["s3"][1]
    assert "jobs start one here" in found["ray cluster"][1]


def test_a_store_that_does_not_answer_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    assert main(["doctor"]) == 1
    mark, text = lines(capsys.readouterr().out)["s3"]
    assert mark == "MISSING"
    assert "http://127.0.0.1:9" in text


def test_credentials_of_a_file_that_may_not_list_buckets_reach_the_store(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    main(["doctor"])
    server.shutdown()
    server.server_close()
    mark, text = lines(capsys.readouterr().out)["s3"]
    assert mark == "ok"
    assert "reached" in text


def test_a_cluster_that_is_given_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    main(["doctor"])
    assert lines(capsys.readouterr().out)["ray cluster"][1] == "10.0.0.1:6379"


def test_what_is_needed_and_not_there_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda name: False)
    assert main(["doctor"]) == 1
    found = lines(capsys.readouterr().out)
    assert found["ray"] == ("MISSING", "not installed: pip install 'ardiff[ray]'")
    assert found["deepspeed"] == ("ok", "not installed: pip install 'ardiff[train]'")
    assert found["deepspeed ops"][0] == "ok"


@pytest.mark.parametrize(
    ("cuda", "driver", "ok", "text"),
    [
        (None, "", True, "none"),
        ("13.0", "580.65.06", True, "580.65.06, torch has CUDA 13.0"),
        ("13.0", "575.57.08", False, "575.57.08, but torch's CUDA 13.0 needs 580 or later"),
        ("12.8", "575.57.08", True, "575.57.08, torch has CUDA 12.8"),
        (None, "580.65.06", False, "this torch has no CUDA"),
        ("14.1", "600.1", True, "torch has CUDA 14.1"),
    ],
)
def test_the_driver_must_run_torchs_cuda(cuda: str | None, driver: str, ok: bool, text: str) -> None:
    finding = doctor.check_driver(cuda, driver)
    assert finding.ok is ok
    assert text in finding.text
