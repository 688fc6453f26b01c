"""A client of the service for scripts and the command line. It imports neither torch nor Ray.

>>> client = Client("http://127.0.0.1:8000")
>>> video = client.create(class_label="ring", num_frames=128, seed=1)
>>> client.wait(video["id"], on_progress=print)
>>> client.download(video["id"], "ring.mp4")
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
import time
import typing
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import httpx

from ardiff.config import field_documentation
from ardiff.errors import ArdiffError
from ardiff.sampling.params import CONDITION_FIELDS, FROM_INPUT, SamplingParams, as_conditions

ENDED = ("completed", "failed", "cancelled", "expired")


class ServiceError(ArdiffError):
    """The service rejected a request, or cannot be reached; then ``status`` is 0."""

    def __init__(self, message: str, status: int = 0, kind: str = "", retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.retry_after = status, kind, retry_after


class Client:
    """A client of one service. Every method raises ServiceError, and retries after ``Retry-After``.

    After the first successful request it also retries broken connections, except for new streams. A repeated request
    for a video makes no second one.
    """

    def __init__(self, url: str, key: str | None = None, patience: float = 60.0) -> None:
        """``key`` is an API key; ``patience`` is how many seconds to retry."""
        self.patience = patience
        self._reached = False
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(30.0, read=300.0))

    def create(self, reference: str | Path | None = None, **settings: Any) -> dict[str, Any]:
        """Requests a video and returns its state. ``reference`` is a picture or clip that the video continues.

        ``settings`` are fields of :class:`~ardiff.sampling.params.SamplingParams`, and ``prompt``, ``seconds``,
        ``model``, ``fps`` and ``size``.
        """
        options = self._body(reference, settings) | {"headers": {"Idempotency-Key": uuid.uuid4().hex}}
        return self._retry(lambda: self._json("POST", "/v1/videos", **options))

    def get(self, video_id: str) -> dict[str, Any]:
        """The state of a video."""
        return self._retry(lambda: self._json("GET", f"/v1/videos/{video_id}"))

    def videos(self, limit: int = 20) -> list[dict[str, Any]]:
        """The last videos, newest first."""
        return list(self._retry(lambda: self._json("GET", "/v1/videos", params={"limit": limit}))["data"])

    def models(self) -> list[dict[str, Any]]:
        """The models of the service and their limits."""
        return list(self._retry(lambda: self._json("GET", "/v1/models"))["data"])

    def change(self, video_id: str, **changes: Any) -> dict[str, Any]:
        """Changes an unfinished video from the first frame that has not started.

        Args:
            changes: ``prompt``, ``class_label`` (index or name) or ``guidance_scale``.

        Returns:
            The change: its ``status``, and ``from_frame`` once that is ``applied``.
        """
        return self._retry(lambda: self._json("PATCH", f"/v1/videos/{video_id}", json=changes))

    def cancel(self, video_id: str) -> dict[str, Any]:
        """Cancels a video, unless it has ended. Returns its state."""
        return self._retry(lambda: self._json("POST", f"/v1/videos/{video_id}/cancel"))

    def delete(self, video_id: str) -> dict[str, Any]:
        """Deletes a video, after cancelling it if it has not ended."""
        return self._retry(lambda: self._json("DELETE", f"/v1/videos/{video_id}"))

    def wait(
        self,
        video_id: str,
        on_progress: Callable[[dict[str, Any]], None] = lambda video: None,
        seconds: float = 0.5,
    ) -> dict[str, Any]:
        """Polls until the video ends. Raises ServiceError unless it is completed."""
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
        """Requests a video and yields its bytes while it is generated. Closing the iterator cancels the video.

        If its replica crashes or stops, the stream continues at the next byte, through whichever replica answers.
        """
        body = self._body(reference, settings)
        with contextlib.ExitStack() as opened:

            def connect(method: str, path: str, **options: Any) -> httpx.Response:
                opened.close()
                return opened.enter_context(self._checked(method, path, **options))

            response = self._retry(lambda: connect("POST", "/v1/videos:stream", **body), once=True)
            video, received = response.headers["x-video-id"], 0
            is_owner = True  # closing the first connection cancels the video
            try:
                while True:
                    tag = response.headers.get("etag")  # None for a stored file, whose bytes are others
                    try:
                        for chunk in response.iter_raw():
                            received += len(chunk)
                            yield chunk
                        return
                    except httpx.HTTPError:
                        if tag is None:
                            raise
                    is_owner = False
                    rest = {"params": {"offset": received}, "headers": {"If-Match": tag}}
                    response = self._retry(functools.partial(connect, "GET", f"/v1/videos/{video}/stream", **rest))
            except GeneratorExit:
                if not is_owner:
                    self.cancel(video)
                raise

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def _write(self, method: str, path: str, target: Path) -> Path:
        draft = target.with_name(f".{target.name}.part")
        try:
            with self._checked(method, path) as response, draft.open("wb") as file:
                for chunk in response.iter_raw():
                    file.write(chunk)
            draft.replace(target)
        except OSError as error:
            raise ServiceError(f"Cannot write {target}: {error.strerror}.") from error
        finally:
            draft.unlink(missing_ok=True)
        return target

    def _body(self, reference: str | Path | None, settings: dict[str, Any]) -> dict[str, Any]:
        fields = {name: value for name, value in settings.items() if value is not None}
        if "conditions" in fields:
            changes = as_conditions(fields["conditions"])
            fields["conditions"] = [{"frame": change.frame, **change.changes()} for change in changes]
        if reference is None:
            return {"json": fields}
        fields = {name: json.dumps(value) if isinstance(value, list) else value for name, value in fields.items()}
        try:
            data = Path(reference).read_bytes()
        except OSError as error:
            raise ServiceError(f"Cannot read {reference}: {error.strerror}.") from error
        return {"data": fields, "files": {"input_reference": (Path(reference).name, data)}}

    def _checked(self, method: str, path: str, **options: Any) -> _Checked:
        return _Checked(self._http.stream(method, path, **options))

    def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise ServiceError(f"The service cannot be reached: {error}.", kind="connection") from error
        _check(response)
        body: dict[str, Any] = response.json()
        return body

    def _retry(self, action: Callable[[], Any], once: bool = False) -> Any:
        """Calls ``action`` until it succeeds. ``once``: not again after a broken connection; it may have arrived."""
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
    """A streamed response whose status is checked first."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __enter__(self) -> httpx.Response:
        try:
            response: httpx.Response = self._stream.__enter__()
        except httpx.HTTPError as error:
            raise ServiceError(f"The service cannot be reached: {error}.", kind="connection") from error
        try:
            if response.is_error:
                response.read()
            _check(response)
        except BaseException:
            self._stream.__exit__(*sys.exc_info())
            raise
        return response

    def __exit__(self, *exc: Any) -> None:
        self._stream.__exit__(*exc)
        if isinstance(exc[1], httpx.HTTPError):
            raise ServiceError("The stream ended before the video was complete.", kind="connection") from exc[1]


def _check(response: httpx.Response) -> None:
    if not response.is_error:
        return
    try:
        error = response.json()["error"]
    except (ValueError, KeyError):
        error = {"message": f"The service responded with status {response.status_code}.", "type": ""}
    wait = response.headers.get("retry-after", "")
    retry_after = float(wait) if wait.isdecimal() else None
    raise ServiceError(error["message"], response.status_code, error["type"], retry_after)


def main(argv: Sequence[str]) -> int:
    """``ardiff client``. Returns 0; raises ServiceError."""
    options = _parser().parse_args(argv)
    client = Client(options.url, options.key or os.environ.get("ARDIFF_API_KEY"))
    settings = {name: getattr(options, name, None) for name in _request_options()}
    match options.command:
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
        case "change":
            changes = {name: getattr(options, name) for name in CONDITION_FIELDS}
            changes = {name: value for name, value in changes.items() if value is not None}
            print(json.dumps(client.change(options.id, **changes), indent=1))
        case "cancel":
            print(json.dumps(client.cancel(options.id), indent=1))
        case "delete":
            print(json.dumps(client.delete(options.id), indent=1))
        case "list":
            for video in client.videos(options.limit):
                print(f"{video['id']}  {video['status']:<12} {video['frames_done']}/{video['num_frames']} frames")
        case "models":
            print(json.dumps(client.models(), indent=1))
    return 0


def _request_options() -> dict[str, dict[str, Any]]:
    """Command line options for the fields of a request: the sampling parameters, and what the service adds."""
    hints, documentation = typing.get_type_hints(SamplingParams), field_documentation(SamplingParams)
    options: dict[str, dict[str, Any]] = {
        "model": {"help": "a model of the service (default: its first one)"},
        "prompt": {"help": "what to show; for a model without text the name of a class"},
        "fps": {"type": float, "help": "frames per second of the file"},
        "seconds": {"type": float, "help": "length of the video, instead of --num-frames"},
    }
    for name in (f.name for f in fields(SamplingParams) if f.name not in (*FROM_INPUT, *options)):
        hint = hints[name]
        if type(None) in typing.get_args(hint):  # of an optional type, the type itself
            hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
        match typing.get_origin(hint):
            case None:
                options[name] = {"type": hint}
            case origin if origin is Literal:
                options[name] = {"choices": typing.get_args(hint)}
            case _:
                options[name] = {"type": _json_value, "metavar": "JSON"}
        options[name]["help"] = documentation[name].replace("%", "%%")
    options["class_label"] |= {"type": str, "help": "class index or name"}
    options["seed"]["help"] = "seed of the noise (default: the service draws one)"
    return options


def _json_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid JSON: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ardiff client", description="Requests videos from a running service.")
    parser.add_argument("--url", default=os.environ.get("ARDIFF_URL", "http://127.0.0.1:8000"), help="or $ARDIFF_URL")
    parser.add_argument("--key", help="API key; use $ARDIFF_API_KEY to hide it from other users of this machine")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, text in (("create", "request a video"), ("stream", "save a video while it is generated")):
        request = commands.add_parser(command, help=text, description=text)
        for name, option in _request_options().items():
            request.add_argument(f"--{name.replace('_', '-')}", **option)
        request.add_argument("--reference", metavar="FILE", help="picture or clip that the video continues")
        request.add_argument("--output", metavar="FILE", required=command == "stream", help="file of the video")
    for command, text in (
        ("get", "print the state of a video"),
        ("wait", "wait for a video"),
        ("download", "save a finished video"),
        ("change", "change an unfinished video from the first frame that has not started"),
        ("cancel", "cancel an unfinished video"),
        ("delete", "delete a video"),
    ):
        video = commands.add_parser(command, help=text, description=text)
        video.add_argument("id")
        if command == "download":
            video.add_argument("--output", metavar="FILE")
        if command == "change":
            for name in CONDITION_FIELDS:
                video.add_argument(f"--{name.replace('_', '-')}", **_request_options()[name])
    newest = commands.add_parser("list", help="list the newest videos")
    newest.add_argument("--limit", type=int, default=20)
    commands.add_parser("models", help="print the models and their limits")
    return parser


def _progress(video: dict[str, Any]) -> None:
    print(f"{video['status']}: {video['frames_done']}/{video['num_frames']} frames", file=sys.stderr)


def _save(chunks: Iterator[bytes], output: str) -> None:
    try:
        with Path(output).open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
                file.flush()  # a player may read it already
    except OSError as error:
        raise ServiceError(f"Cannot write {output}: {error.strerror}.") from error
    print(output)
