"""Errors of the endpoint: a request that is refused, and a job that ends without a video."""

from ardiff.errors import ArdiffError
from ardiff.serving.records import JobRecord


class RequestError(ArdiffError):
    """An HTTP error response: the status, the kind of error, the invalid field, when to retry, and further headers."""

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        param: str | None = None,
        retry_after: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.retry_after = status, kind, param, retry_after
        self.headers = headers or {}


class UnavailableError(RequestError):
    """503, because the database or storage does not respond."""

    def __init__(self, kind: str) -> None:
        message = f"The {kind} of jobs is unavailable: try again."
        super().__init__(503, f"{kind}_unavailable", message, retry_after=5)


class JobError(ArdiffError):
    """Why a job ended without a complete video: a kind, and a message for the client.

    Three kinds are no failure of the job: ``cancelled``; ``released``, which returns it to the queue; and ``lost``,
    when another replica holds its lease.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def invalid(param: str | None, message: str) -> RequestError:
    """422 for a field whose value is not accepted."""
    return RequestError(422, "invalid_request", message, param)


def not_found() -> RequestError:
    """404 for a video that does not exist, or belongs to another key."""
    return RequestError(404, "not_found", "There is no such video.")


def overloaded(message: str, retry_after: float) -> RequestError:
    """503 for a replica that has no capacity now."""
    return RequestError(503, "overloaded", message, retry_after=retry_after)


def video_unavailable(record: JobRecord) -> RequestError:
    """Why the record's job has no video, or none yet."""
    match record.status:
        case "expired":
            return RequestError(410, "expired", "The video has expired.")
        case "failed":
            return RequestError(409, record.error_type or "failed", record.error or "The video failed.")
        case "cancelled":
            return RequestError(409, "cancelled", "The video was cancelled.")
        case _:
            return RequestError(409, "not_ready", f"The video is {record.status}: try again later.", retry_after=1)
