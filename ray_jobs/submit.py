"""Runs a job on a cluster from here: sends the code, follows the log, ends as the job ends.

    ardiff submit --address http://127.0.0.1:8265 train-dit --config configs/sky/train_dit.yaml output=s3://runs/dit

It is `ray job submit --working-dir . -- python -m ray_jobs.train_dit ...` with the configuration checked before it is
sent, nothing sent but code and configurations, the job's own exit code, and a stop that can be gone on from.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import re
import secrets
import shlex
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

from ardiff.arguments import Call
from ardiff.cli import COMMANDS, read_arguments
from ardiff.config import base_files, fingerprint, to_dict
from ardiff.data import storage
from ardiff.errors import ArdiffError, ConfigError
from ray_jobs.runtime.console import print_line
from ray_jobs.runtime.stages import COMMIT, versions

AnswerT = TypeVar("AnswerT")
ADDRESS = "http://127.0.0.1:8265"
PATIENCE = 120.0
"""Seconds that the connection may be gone before following is given up."""
CARRIED = ("ardiff", "ray_jobs", "configs")
"""What a job gets of the folder it is sent from, beside the configurations that it names."""
NOISY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
    "ray._private.runtime_env.working_dir",
)
"""Loggers that list what is left behind, folder by folder."""
SECRET = re.compile("secret|token|password|credential|access_key|api_key", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Submission:
    """What is sent to the cluster."""

    name: str
    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]


def main(arguments: Sequence[str]) -> int:
    """Submits what the arguments say. Returns the job's exit code, or 130 if it was stopped. Raises ArdiffError."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.job not in jobs():
        parser.error(f"no job '{options.job}': choose one of {', '.join(jobs())}")
    call = read_arguments(options.job, options.arguments)
    folder = Path(options.working_dir).resolve()
    submission = plan(options.job, options.arguments, call, folder, options.env)
    if options.dry_run or call.dry_run:
        _show(submission)
        return 0
    with connection(options.address, options.token_file) as client:
        return run(client, submission, options.detach)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ardiff submit",
        description="Runs a job on a cluster and follows it: the exit code is the job's, Ctrl-C stops it.",
        epilog=f"Jobs: {', '.join(jobs())}. `ardiff JOB --help` lists the settings of one.",
    )
    add_connection(parser, os.environ.get("RAY_API_SERVER_ADDRESS") or ADDRESS)
    parser.add_argument("--working-dir", metavar="PATH", default=".", help="folder whose code is sent (default: here)")
    parser.add_argument(
        "--env", metavar="NAME=VALUE", action="append", default=[], help="variable of the job's environment; no secrets"
    )
    parser.add_argument("--detach", action="store_true", help="return as soon as the job is accepted")
    parser.add_argument("--dry-run", action="store_true", help="print what would be sent and stop")
    parser.add_argument("job", metavar="JOB", help="a command of `ardiff`")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="arguments of the command")
    return parser


def add_connection(parser: argparse.ArgumentParser, default: str | None) -> None:
    """The options that say which cluster is meant."""
    text = "the cluster's dashboard" + (f" (default: RAY_API_SERVER_ADDRESS, or {default})" if default else "")
    parser.add_argument("--address", metavar="URL", default=default, help=text)
    parser.add_argument(
        "--token-file", metavar="PATH", help="the cluster's token (default: RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token)"
    )


def jobs() -> list[str]:
    """The commands that can be submitted."""
    return [command for command, (module, _, _) in COMMANDS.items() if module.startswith("ray_jobs.")]


def plan(job: str, arguments: Sequence[str], call: Call, folder: Path, environment: Sequence[str]) -> Submission:
    """What is sent for a job. Raises ConfigError for what could not work on the cluster."""
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder} to send.")
    output = to_dict(call.config).get("output")
    if output is not None and not (storage.is_remote(output) or Path(output).is_absolute()):
        raise ConfigError(
            f"output={output} would lie in a temporary folder of the cluster: give s3://..., or an absolute path that "
            "all nodes share."
        )
    runtime_env = package(folder, _files(call, folder), **dict(_variable(text) for text in environment))
    metadata = {"job": job, "fingerprint": fingerprint(call.config), "commit": runtime_env["env_vars"][COMMIT]}
    return Submission(
        f"{job}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}",
        shlex.join(["python", "-m", COMMANDS[job][0], *arguments]),
        runtime_env,
        metadata | ({} if output is None else {"output": output}),
    )


def package(folder: Path, files: Sequence[str], **variables: str) -> dict[str, Any]:
    """The runtime environment of a job: code and configurations of ``folder``, and ``files`` below it."""
    return {
        "working_dir": str(folder),
        "excludes": _all_but(files),
        "env_vars": {"PYTHONUNBUFFERED": "1", COMMIT: versions()["git"], **variables},
    }


def _all_but(files: Sequence[str]) -> list[str]:
    """Patterns of what is left behind: all but the folders that are carried, and the files."""
    single = [Path(file) for file in files if Path(file).parts[0] not in CARRIED]
    parents = {parent for file in single for parent in file.parents} - {Path()}
    patterns = ["/*", "!/.", *(f"!/{name}" for name in CARRIED)]
    for parent in sorted(parents, key=lambda path: len(path.parts)):
        patterns += [f"!/{parent.as_posix()}", f"/{parent.as_posix()}/*"]
    return [*patterns, *(f"!/{file.as_posix()}" for file in single), "__pycache__/"]


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--env {text}: write NAME=VALUE.")
    if SECRET.search(name):
        raise ConfigError(f"--env {name}: anyone who sees the dashboard could read it. Give secrets to the nodes.")
    return name, value


def _files(call: Call, folder: Path) -> list[str]:
    """The configurations' names below the folder. Raises ConfigError for one that the job would not find."""
    names = []
    for file in call.files:
        path = Path(file)
        if path.is_absolute() or not (folder / path).resolve().is_relative_to(folder):
            raise ConfigError(f"--config {file}: give a path relative to {folder}, and inside: it is what is sent.")
        if not (folder / path).exists():
            raise ConfigError(f"--config {file}: there is no such file in {folder}.")
        names += [os.path.normpath(name) for name in (path, *base_files(path))]
    return names


def _show(submission: Submission) -> None:
    print(f"entrypoint: {submission.entrypoint}")
    print(f"code: {submission.runtime_env['working_dir']}: {' '.join(submission.runtime_env['excludes'])}")
    for title, values in (("environment", submission.runtime_env["env_vars"]), ("metadata", submission.metadata)):
        print(f"{title}: {' '.join(f'{name}={value}' for name, value in values.items())}")


@contextlib.contextmanager
def connection(address: str, token_file: str | None) -> Iterator[JobSubmissionClient]:
    """A client of the cluster. What goes wrong with the connection is raised as an ArdiffError."""
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"--address {address} is not the URL of a dashboard, such as {ADDRESS}.")
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # else RAY_ADDRESS would be taken
    token = _token(token_file)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        # Ray would read the token only if RAY_AUTH_MODE was set before it was imported.
        yield JobSubmissionClient(address, headers={"authorization": f"Bearer {token}"} if token else None)
    except AuthenticationError as error:
        raise ArdiffError(
            f"The cluster at {address} asks for a token, and this is not it or there is none: give --token-file, or "
            "RAY_AUTH_TOKEN_PATH."
        ) from error
    except (ConnectionError, requests.RequestException) as error:
        raise ArdiffError(
            f"There is no cluster at {address}, or it cannot be reached: check --address, and the tunnel to it."
        ) from error
    except RuntimeError as error:
        if (status := _status(error)) is None:
            raise
        raise ArdiffError(
            f"{address} answers with status {status}: is it the dashboard of a cluster that is up? Try again, or see "
            "the head's log."
        ) from error


def _token(file: str | None) -> str:
    """The token from where Ray looks for it, or from the file; empty if there is none. Raises ConfigError."""
    if file is None and os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"]
    named = file or os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    if not path.is_file():
        if named:
            raise ConfigError(f"The file of the token, {named}: there is no such file.")
        return ""
    token = path.read_text().strip()
    if not re.fullmatch(r"[!-~]+", token):
        raise ConfigError(f"The file of the token, {path}, does not hold one: it should be one word.")
    return token


def run(client: JobSubmissionClient, submission: Submission, detach: bool = False, told: bool = False) -> int:
    """Submits and, unless detached, follows to the end. Returns the exit code. Raises ArdiffError.

    Args:
        told: The job has said all there is to say when it ends with a code of its own.
    """
    _check_alone(client, submission)
    job = _submit(client, submission)
    print_line(f"{job}: {client.get_address()}/#/jobs/{job}")
    if detach:
        return 0
    try:
        asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        print_line(f"Stopping {job}; once more Ctrl-C leaves at once.")
        _patiently(lambda: client.stop_job(job), job)
    return _ending(client, job, told)


def _submit(client: JobSubmissionClient, submission: Submission) -> str:
    """Hands the job over; a cluster that has just started may need a while until it takes one. Raises ArdiffError."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return client.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=submission.name,
                runtime_env=submission.runtime_env,
                metadata=submission.metadata,
            )
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            if "No available agent" not in reason or time.monotonic() > deadline:
                raise ArdiffError(f"The cluster refuses the job: {reason}") from error
        time.sleep(2)


def _check_alone(client: JobSubmissionClient, submission: Submission) -> None:
    """Two jobs that write one folder would destroy each other's work."""
    output = submission.metadata.get("output")
    for other in client.list_jobs():
        if output and not other.status.is_terminal() and (other.metadata or {}).get("output") == output:
            raise ArdiffError(
                f"{other.submission_id} is at work on {output} already: wait for it, or stop it with "
                f"`ray job stop {other.submission_id}`."
            )


async def _follow(client: JobSubmissionClient, job: str) -> None:
    """Copies the job's log to standard output until the job has ended, across lost connections."""
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
        if look(client, job).status.is_terminal():
            break
        await asyncio.sleep(1)
    with contextlib.suppress(RuntimeError, aiohttp.ClientError):  # what came after Ray had looked last
        sys.stdout.write(client.get_job_logs(job)[shown:])
        sys.stdout.flush()


def _ending(client: JobSubmissionClient, job: str, told: bool) -> int:
    """Waits until the job has ended, says how if not well, and returns its exit code."""
    while not (details := look(client, job)).status.is_terminal():
        time.sleep(0.5)
    match details.status:
        case JobStatus.SUCCEEDED:
            return 0
        case JobStatus.STOPPED:
            print_line("Stopped. The same command goes on where this one stopped.")
            return 130
        case _:
            return _failure(job, details, told)


def look(client: JobSubmissionClient, job: str) -> JobDetails:
    """What the cluster knows of the job. Raises ArdiffError if it does not know it or cannot be reached for long."""
    return _patiently(lambda: client.get_job_info(job), job)


def _patiently(ask: Callable[[], AnswerT], job: str) -> AnswerT:
    """The cluster's answer, asked for again for two minutes while it cannot be reached or answers that it cannot."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return ask()
        except (requests.RequestException, RuntimeError) as error:
            status = _status(error)
            if status == 404:
                raise ArdiffError(f"{job} was lost with the head of the cluster: submit the same command.") from error
            if isinstance(error, RuntimeError) and (status is None or status < 500):
                raise
            if time.monotonic() > deadline:
                raise ArdiffError(
                    f"The cluster cannot be reached any more. {job} goes on there: `ray job logs --follow {job}`."
                ) from error
        time.sleep(2)


def _status(error: Exception) -> int | None:
    """The status with which a cluster answered: Ray's client has but the text of a RuntimeError for it."""
    found = re.match(r"Request failed with status code (\d+)", str(error))
    return int(found[1]) if found else None


def _failure(job: str, details: JobDetails, told: bool) -> int:
    code = details.driver_exit_code
    if not code:  # it did not end by itself: the log has no reason
        raise ArdiffError(f"{job} was lost: {(details.message or 'no reason is known').strip()}")
    if not told:
        print_line(f"{job} failed with exit code {code}. Mend what its last line says; the same command goes on.")
    return code if code > 0 else 128 - code
