"""The client against a running service, from Python and from the command line."""

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import pytest

from ardiff.cli import main
from ardiff.client import Client, ServiceError

from .conftest import Serve, eventually


def frames_in(file: Path) -> int:
    with av.open(io.BytesIO(file.read_bytes()), "r") as container:
        return len(list(container.decode(video=0)))


def test_a_script_requests_waits_and_downloads(serve: Serve, tmp_path: Path) -> None:
    served = serve()
    client = Client(served.url)
    seen: list[str] = []
    video = client.create(class_label="ring", num_frames=6, num_inference_steps=5, seed=1)
    done = client.wait(video["id"], lambda v: seen.append(v["status"]), seconds=0.02)
    assert seen[-1] == done["status"] == "completed"
    assert frames_in(client.download(video["id"], tmp_path / "a.mp4")) == 6
    parts = list(client.stream(num_frames=6, num_inference_steps=5, seed=1, class_label=1))
    (tmp_path / "b.mp4").write_bytes(b"".join(parts))
    assert frames_in(tmp_path / "b.mp4") == 6
    assert client.wait(client.videos()[0]["id"], seconds=0.02)["frames_sha256"] == done["frames_sha256"]
    longer = client.create(tmp_path / "a.mp4", num_frames=10, num_inference_steps=5)
    assert longer["given_frames"] == 6
    client.wait(longer["id"], seconds=0.02)
    assert client.cancel(video["id"])["status"] == "completed"  # it has ended
    assert client.delete(video["id"])["deleted"]
    with pytest.raises(ServiceError, match="no such video") as refused:
        client.get(video["id"])
    assert refused.value.status == 404
    with pytest.raises(ServiceError, match="at most"):
        client.create(num_frames=10**6)
    with pytest.raises(ServiceError, match="Cannot read"):
        client.create(tmp_path / "none.png")
    client.close()


def test_a_stream_retries_until_a_slot_is_free(serve: Serve) -> None:
    served = serve(engine={"max_requests": 1})
    first = Client(served.url).stream(num_frames=1000, num_inference_steps=50)
    next(first)
    threading.Timer(0.3, first.close).start()
    assert list(Client(served.url).stream(num_frames=2, num_inference_steps=2))


def test_a_broken_connection_is_retried_except_for_streams() -> None:
    requests: list[str] = []
    keys: list[str | None] = []

    class Breaking(BaseHTTPRequestHandler):
        """Closes the connection on every other request."""

        def answer(self) -> None:
            requests.append(self.command)
            keys.append(self.headers["Idempotency-Key"])
            if len(requests) % 2 == 0:
                self.connection.close()
                return
            body = b'{"data": []}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer  # noqa: N815

        def log_message(self, *arguments: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Breaking) as server:
        threading.Thread(target=server.serve_forever).start()
        client = Client(f"http://127.0.0.1:{server.server_port}")
        assert client.models() == client.models() == []
        assert requests == ["GET"] * 3
        assert client.create() == {"data": []}
        assert requests == ["GET"] * 3 + ["POST"] * 2
        assert keys[3] is not None
        assert keys[3] == keys[4]
        with pytest.raises(ServiceError, match="cannot be reached"):
            list(client.stream())
        assert requests == ["GET"] * 3 + ["POST"] * 3
        server.shutdown()
    nobody = Client(f"http://127.0.0.1:{server.server_port}")
    with pytest.raises(ServiceError, match="cannot be reached"):
        nobody.models()  # no retry: the URL may be wrong


def test_the_command(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = serve().url
    settings = ["--num-frames", "5", "--num-inference-steps", "4", "--class-label", "2", "--seed", "3"]
    assert main(["client", "--url", url, "create", *settings, "--output", str(tmp_path / "a.mp4")]) == 0
    video_id = capsys.readouterr().out.split()[0]
    assert frames_in(tmp_path / "a.mp4") == 5
    assert main(["client", "--url", url, "get", video_id]) == 0
    assert json.loads(capsys.readouterr().out)["class_label"] == 2
    assert main(["client", "--url", url, "stream", *settings, "--output", str(tmp_path / "b.mp4")]) == 0
    assert frames_in(tmp_path / "b.mp4") == 5

    def listed() -> bool:  # a stream ends before its record is written
        assert main(["client", "--url", url, "list"]) == 0
        return capsys.readouterr().out.count("completed") == 2

    eventually(listed)
    assert main(["client", "--url", url, "wait", video_id]) == 0
    assert main(["client", "--url", url, "download", video_id, "--output", str(tmp_path / "c.mp4")]) == 0
    assert main(["client", "--url", url, "models"]) == 0
    assert main(["client", "--url", url, "cancel", video_id]) == 0
    assert main(["client", "--url", url, "delete", video_id]) == 0
    capsys.readouterr()
    assert main(["client", "--url", url, "get", video_id]) == 1
    assert capsys.readouterr().err == "ardiff: There is no such video.\n"
    assert main(["client", "--url", "http://127.0.0.1:9", "list"]) == 1
    assert "cannot be reached" in capsys.readouterr().err
