"""A filter before the S3 server: a line for every request, so that tests can count what a job costs."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


def factory(defaults: dict[str, str], *, path: str, **other: str) -> Callable[[Application], Application]:
    """What the server's configuration names; ``path`` is the file of lines ``METHOD PATH?QUERY``."""

    def make(application: Application) -> Application:
        def count(request: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            with Path(path).open("a") as file:
                file.write(f"{request['REQUEST_METHOD']} {request['PATH_INFO']}?{request.get('QUERY_STRING', '')}\n")
            return application(request, start_response)

        return count

    return make
