"""A client of the service, for scripts and the command line; it needs neither torch nor Ray.

>>> client = Client("http://127.0.0.1:8000")
>>> video = client.create(class_label="ring", num_frames=128, seed=1)
>>> client.wait(video["id"], on_progress=print)
>>> client.download(video["id"], "ring.mp4")
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from ardiff.errors import ArdiffError

ENDED = ("completed", "failed", "cancelled", "expired")


class ServiceError(ArdiffError):
    """The service refused, or cannot be reached. ``status`` is 0 for the latter."""

    def __init__(self, message: str, status: int = 0, kind: str = "", retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.retry_after = status, kind, retry_after


class Client:
    """Talks to one service. Every method raises ServiceError, and tries again where the service asks for it.

    A connection that breaks is tried again too, once the service has been reached, except by what asks for a video.
    """

    def __init__(self, url: str, key: str | None = None, patience: float = 60.0) -> None:
        """``key`` is an API key; ``patience`` the seconds for which a busy service is asked again."""
        self.patience = patience
        self._reached = False
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(30.0, read=300.0))

    def create(self, reference: str | Path | None = None, **settings: Any) -> dict[str, Any]:
        """Asks for a video and returns its record; ``reference`` is a picture or clip that it continues."""
        return self._retry(lambda: self._json("POST", "/v1/videos", **self._body(reference, settings)), once=True)

    def get(self, video_id: str) -> dict[str, Any]:
        """The record of a video."""
        return self._retry(lambda: self._json("GET", f"/v1/videos/{video_id}"))

    def videos(self, limit: int = 20) -> list[dict[str, Any]]:
        """The last videos, newest first."""
        answer = self._retry(lambda: self._json("GET", "/v1/videos", params={"limit": limit}))
        return list(answer["data"])

    def models(self) -> list[dict[str, Any]]:
        """What can be asked for."""
        return list(self._retry(lambda: self._json("GET", "/v1/models"))["data"])

    def cancel(self, video_id: str) -> dict[str, Any]:
        """Cancels a video that is not finished, or removes a finished one."""
        return self._retry(lambda: self._json("DELETE", f"/v1/videos/{video_id}"))

    def wait(
        self,
        video_id: str,
        on_progress: Callable[[dict[str, Any]], None] = lambda video: None,
        seconds: float = 0.5,
    ) -> dict[str, Any]:
        """Waits for the end, asking every ``seconds``. Raises ServiceError unless the video is completed."""
        while (video := self.get(video_id))["status"] not in ENDED:
            on_progress(video)
            time.sleep(seconds)
        on_progress(video)
        if video["status"] != "completed":
            reason = f": {video['error']['message']}" if video["error"] else "."
            raise ServiceError(f"The video {video_id} is {video['status']}{reason}", kind=video["status"])
        return video

    def download(self, video_id: str, path: str | Path) -> Path:
        """Writes the finished video to a file."""
        return self._retry(lambda: self._write("GET", f"/v1/videos/{video_id}/content", Path(path)))

    def stream(self, reference: str | Path | None = None, **settings: Any) -> Iterator[bytes]:
        """Asks for a video and yields its parts while it is generated; stop reading and it is cancelled."""
        body = self._body(reference, settings)
        with contextlib.ExitStack() as opened:
            answer = self._retry(
                lambda: opened.enter_context(self._checked("POST", "/v1/videos:stream", **body)), once=True
            )
            yield from answer.iter_raw()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def _write(self, method: str, path: str, target: Path) -> Path:
        draft = target.with_name(f".{target.name}.part")
        try:
            with self._checked(method, path) as answer, draft.open("wb") as file:
                for part in answer.iter_raw():
                    file.write(part)
            draft.replace(target)
        except OSError as error:
            raise ServiceError(f"Cannot write {target}: {error.strerror}.") from error
        finally:
            draft.unlink(missing_ok=True)
        return target

    def _body(self, reference: str | Path | None, settings: dict[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in settings.items() if value is not None}
        if reference is None:
            return {"json": given}
        try:
            data = Path(reference).read_bytes()
        except OSError as error:
            raise ServiceError(f"Cannot read {reference}: {error.strerror}.") from error
        return {"data": given, "files": {"input_reference": (Path(reference).name, data)}}

    def _checked(self, method: str, path: str, **options: Any) -> _Checked:
        return _Checked(self._http.stream(method, path, **options))

    def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            answer = self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise ServiceError(f"The service cannot be reached: {error}.", kind="connection") from error
        _check(answer)
        told: dict[str, Any] = answer.json()
        return told

    def _retry(self, action: Callable[[], Any], once: bool = False) -> Any:
        """``once``: not again after a broken connection, since the service may have heard it."""
        deadline = time.monotonic() + self.patience
        while True:
            try:
                result = action()
                self._reached = True
                return result
            except ServiceError as error:
                self._reached, wait = self._reached or error.status > 0, error.retry_after
                if error.kind == "connection" and self._reached and not once:
                    wait = 1.0
                if wait is None or time.monotonic() + wait > deadline:
                    raise
                time.sleep(wait)


class _Checked:
    """A streamed answer whose status is checked first."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __enter__(self) -> httpx.Response:
        try:
            answer: httpx.Response = self._stream.__enter__()
        except httpx.HTTPError as error:
            raise ServiceError(f"The service cannot be reached: {error}.", kind="connection") from error
        try:
            if answer.is_error:
                answer.read()
            _check(answer)
        except BaseException:
            self._stream.__exit__(*sys.exc_info())
            raise
        return answer

    def __exit__(self, *exc: Any) -> None:
        self._stream.__exit__(*exc)
        if isinstance(exc[1], httpx.HTTPError):
            raise ServiceError("The video broke off: the service stopped generating it.", kind="connection") from exc[1]


def _check(answer: httpx.Response) -> None:
    if not answer.is_error:
        return
    try:
        error = answer.json()["error"]
    except (ValueError, KeyError):
        error = {"message": f"The service answered {answer.status_code}.", "type": ""}
    wait = answer.headers.get("retry-after", "")
    retry_after = float(wait) if wait.isdecimal() else None
    raise ServiceError(error["message"], answer.status_code, error["type"], retry_after)


def main(argv: Sequence[str]) -> int:
    """``ardiff client``. Returns 0; raises ServiceError."""
    options = _parser().parse_args(argv)
    client = Client(options.url, options.key or os.environ.get("ARDIFF_API_KEY"))
    settings = {name: getattr(options, name, None) for name in _SETTINGS}
    match options.verb:
        case "create":
            video = client.create(options.reference, **settings)
            print(video["id"])
            if options.output:
                client.wait(video["id"], _progress)
                print(client.download(video["id"], options.output))
        case "stream":
            _save(client.stream(options.reference, **settings), options.output)
        case "wait":
            client.wait(options.id, _progress)
        case "download":
            print(client.download(options.id, options.output or f"{options.id}.mp4"))
        case "get":
            print(json.dumps(client.get(options.id), indent=1))
        case "cancel":
            print(json.dumps(client.cancel(options.id), indent=1))
        case "list":
            for video in client.videos(options.limit):
                print(f"{video['id']}  {video['status']:<12} {video['frames_done']}/{video['num_frames']} frames")
        case "models":
            print(json.dumps(client.models(), indent=1))
    return 0


_SETTINGS: dict[str, type] = {
    "model": str,
    "class_label": str,
    "num_frames": int,
    "ar_step": int,
    "num_inference_steps": int,
    "guidance_scale": float,
    "seed": int,
    "fps": float,
    "mode": str,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ardiff client", description="Asks a running service for videos.")
    parser.add_argument("--url", default=os.environ.get("ARDIFF_URL", "http://127.0.0.1:8000"), help="or $ARDIFF_URL")
    parser.add_argument("--key", help="API key; better in $ARDIFF_API_KEY, where other users do not see it")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, text in (("create", "ask for a video"), ("stream", "save a video while it is generated")):
        asking = verbs.add_parser(verb, help=text, description=text)
        for name, kind in _SETTINGS.items():
            asking.add_argument(f"--{name.replace('_', '-')}", type=kind)
        asking.add_argument("--reference", metavar="FILE", help="picture or clip that the video continues")
        asking.add_argument("--output", metavar="FILE", required=verb == "stream", help="where the video goes")
    for verb, text in (
        ("get", "print the record of a video"),
        ("wait", "wait for a video"),
        ("download", "save a finished video"),
        ("cancel", "cancel a video, or remove a finished one"),
    ):
        one = verbs.add_parser(verb, help=text, description=text)
        one.add_argument("id")
        if verb == "download":
            one.add_argument("--output", metavar="FILE")
    listing = verbs.add_parser("list", help="list the last videos")
    listing.add_argument("--limit", type=int, default=20)
    verbs.add_parser("models", help="print what can be asked for")
    return parser


def _progress(video: dict[str, Any]) -> None:
    print(f"{video['status']}: {video['frames_done']}/{video['num_frames']} frames", file=sys.stderr)


def _save(parts: Iterator[bytes], output: str) -> None:
    try:
        with Path(output).open("wb") as file:
            for part in parts:
                file.write(part)
                file.flush()  # a player may be reading it
    except OSError as error:
        raise ServiceError(f"Cannot write {output}: {error.strerror}.") from error
    print(output)
