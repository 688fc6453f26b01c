"""Jobs on a remote cluster: connects to its dashboard, submits a job, follows its log and returns its exit code."""

import argparse
import asyncio
import contextlib
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import requests
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from ardiff.errors import ArdiffError, ConfigError
from ray_jobs.runtime.console import print_line
from ray_jobs.runtime.stages import COMMIT, versions

ResultT = TypeVar("ResultT")
ADDRESS = "http://127.0.0.1:8265"
RECONNECT_SECONDS = 120.0
"""Seconds without a connection after which following a job fails."""
PACKAGED = ("ardiff", "ray_jobs", "configs")
"""Folders that are sent with a job, besides the configurations that it names."""
NOISY_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
    "ray._private.runtime_env.working_dir",
)
"""Loggers that list every folder that is not sent."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A job for the cluster."""

    name: str
    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]
    driver_cpus: float = 0.0
    """CPUs that the job's driver reserves, on any node. Without them it runs on the head."""


def add_connection_options(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Adds the options that select the cluster."""
    text = "the cluster's dashboard" + (f" (default: RAY_API_SERVER_ADDRESS, or {default})" if default else "")
    parser.add_argument("--address", metavar="URL", default=default, help=text)
    parser.add_argument(
        "--token-file", metavar="PATH", help="the cluster's token (default: RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token)"
    )


def runtime_env(folder: Path, files: Sequence[str], **variables: str) -> dict[str, Any]:
    """The runtime environment of a job: code and configurations of ``folder``, and ``files`` below it."""
    return {
        "working_dir": str(folder),
        "excludes": _exclude_all_but(files),
        "env_vars": {"PYTHONUNBUFFERED": "1", COMMIT: versions()["git"], **variables},
    }


def _exclude_all_but(files: Sequence[str]) -> list[str]:
    """Exclude patterns for everything except the packaged folders and ``files``."""
    single = [Path(file) for file in files if Path(file).parts[0] not in PACKAGED]
    parents = {parent for file in single for parent in file.parents} - {Path()}
    patterns = ["/*", "!/.", *(f"!/{name}" for name in PACKAGED)]
    for parent in sorted(parents, key=lambda path: len(path.parts)):
        patterns += [f"!/{parent.as_posix()}", f"/{parent.as_posix()}/*"]
    return [*patterns, *(f"!/{file.as_posix()}" for file in single), "__pycache__/"]


@contextlib.contextmanager
def connection(address: str, token_file: str | None) -> Iterator[JobSubmissionClient]:
    """A client of the cluster. Connection failures in the block are raised as ArdiffError."""
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"--address {address} is not the URL of a dashboard, such as {ADDRESS}.")
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # it takes precedence over RAY_ADDRESS
    token = _token(token_file)
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        # Ray reads the token itself only if RAY_AUTH_MODE was set before Ray was imported.
        yield JobSubmissionClient(address, headers={"authorization": f"Bearer {token}"} if token else None)
    except AuthenticationError as error:
        raise ArdiffError(
            f"The cluster at {address} needs a token, and the given one is missing or wrong: give --token-file, or "
            "RAY_AUTH_TOKEN_PATH."
        ) from error
    except (ConnectionError, requests.RequestException) as error:
        raise ArdiffError(
            f"There is no cluster at {address}, or it cannot be reached: check --address, and the tunnel to it."
        ) from error
    except RuntimeError as error:
        if (status := _http_status(error)) is None:
            raise
        raise ArdiffError(
            f"{address} answers with status {status}: check that it is the dashboard of a running cluster. Try again, "
            "or see the head's log."
        ) from error


def _token(file: str | None) -> str:
    """The token from the file or from where Ray looks for it; empty if there is none. Raises ConfigError."""
    if file is None and os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"]
    given = file or os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(given) if given else Path.home() / ".ray" / "auth_token"
    if not path.is_file():
        if given:
            raise ConfigError(f"The token file {given} does not exist.")
        return ""
    token = path.read_text().strip()
    if not re.fullmatch(r"[!-~]+", token):
        raise ConfigError(f"The token file {path} does not hold a token: it should be one word.")
    return token


def run(client: JobSubmissionClient, submission: Submission, detach: bool = False, quiet: bool = False) -> int:
    """Submits a job and follows it to the end, unless detached. Returns its exit code. Raises ArdiffError.

    Args:
        client: Of the cluster.
        submission: The job.
        detach: Return as soon as the job is accepted.
        quiet: Print nothing if the job fails with an exit code of its own.
    """
    _check_output_unused(client, submission)
    job = _submit(client, submission)
    print_line(f"{job}: {client.get_address()}/#/jobs/{job}")
    if detach:
        return 0
    try:
        asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        print_line(f"Stopping {job}. Press Ctrl-C again to leave without waiting.")
        _retry(lambda: client.stop_job(job), job)
    return _exit_code(client, job, quiet)


def _submit(client: JobSubmissionClient, submission: Submission) -> str:
    """Submits the job. Retries while a cluster that has just started has no agent yet. Raises ArdiffError."""
    deadline = time.monotonic() + RECONNECT_SECONDS
    while True:
        try:
            return client.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=submission.name,
                runtime_env=submission.runtime_env,
                metadata=submission.metadata,
                entrypoint_num_cpus=submission.driver_cpus or None,
            )
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            if "No available agent" not in reason or time.monotonic() > deadline:
                raise ArdiffError(f"The cluster rejects the job: {reason}") from error
        time.sleep(2)


def _check_output_unused(client: JobSubmissionClient, submission: Submission) -> None:
    """Raises ArdiffError if a running job writes to the same output: both would overwrite each other's files."""
    output = submission.metadata.get("output")
    for other in client.list_jobs():
        if output and not other.status.is_terminal() and (other.metadata or {}).get("output") == output:
            raise ArdiffError(
                f"{other.submission_id} is already writing to {output}: wait for it, or stop it with "
                f"`ray job stop {other.submission_id}`."
            )


async def _follow(client: JobSubmissionClient, job: str) -> None:
    """Copies the job's log to standard output until the job has ended. Reconnects if the connection is lost."""
    shown = 0
    while True:
        seen = 0
        with contextlib.suppress(RuntimeError, aiohttp.ClientError):
            async for text in client.tail_job_logs(job):
                seen += len(text)
                if seen > shown:
                    sys.stdout.write(text[len(text) - (seen - shown) :])
                    sys.stdout.flush()
                    shown = seen
        if job_details(client, job).status.is_terminal():
            break
        await asyncio.sleep(1)
    with contextlib.suppress(RuntimeError, aiohttp.ClientError):  # the rest of the log
        sys.stdout.write(client.get_job_logs(job)[shown:])
        sys.stdout.flush()


def _exit_code(client: JobSubmissionClient, job: str, quiet: bool) -> int:
    """Waits for the end of the job, prints why it ended if it did not succeed, and returns its exit code."""
    while not (details := job_details(client, job)).status.is_terminal():
        time.sleep(0.5)
    match details.status:
        case JobStatus.SUCCEEDED:
            return 0
        case JobStatus.STOPPED:
            print_line("Stopped. The same command resumes.")
            return 130
    code = details.driver_exit_code
    if not code:  # it was killed, and the log has no reason
        raise ArdiffError(f"{job} was lost: {(details.message or 'the reason is unknown').strip()}")
    if not quiet:
        print_line(f"{job} failed with exit code {code}. Fix the error above; the same command resumes.")
    return code if code > 0 else 128 - code


def job_details(client: JobSubmissionClient, job: str) -> JobDetails:
    """The state of a job. Raises ArdiffError if the cluster lost the job or stays unreachable."""
    return _retry(lambda: client.get_job_info(job), job)


def _retry(request: Callable[[], ResultT], job: str) -> ResultT:
    """The result of a request, retried for ``RECONNECT_SECONDS`` while the cluster is unreachable or has an error."""
    deadline = time.monotonic() + RECONNECT_SECONDS
    while True:
        try:
            return request()
        except (requests.RequestException, RuntimeError) as error:
            status = _http_status(error)
            if status == 404:
                raise ArdiffError(f"{job} was lost with the head of the cluster: submit the same command.") from error
            if isinstance(error, RuntimeError) and (status is None or status < 500):
                raise
            if time.monotonic() > deadline:
                raise ArdiffError(
                    f"The cluster cannot be reached any more. {job} continues there: `ray job logs --follow {job}`."
                ) from error
        time.sleep(2)


def _http_status(error: Exception) -> int | None:
    """The HTTP status in an error of Ray's client, which only has it in the text of a RuntimeError."""
    match = re.match(r"Request failed with status code (\d+)", str(error))
    return int(match[1]) if match else None
