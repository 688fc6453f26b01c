"""Runs a job on a remote cluster: sends the code, follows the log, and exits with the job's exit code.

    ardiff submit --address http://127.0.0.1:8265 train-dit --config configs/sky/train_dit.yaml output=s3://runs/dit

It corresponds to `ray job submit --working-dir . -- python -m ray_jobs.train_dit ...`. It also checks the configuration
before it is sent, sends only code and configurations, and stops the job on Ctrl-C so that it can resume.
"""

import argparse
import os
import re
import secrets
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from ardiff.arguments import Call
from ardiff.cli import COMMANDS, read_arguments
from ardiff.config import base_files, fingerprint, to_dict
from ardiff.data import storage
from ardiff.errors import ConfigError
from ray_jobs.runtime.job_client import ADDRESS, Submission, add_connection_options, connection, run, runtime_env
from ray_jobs.runtime.stages import COMMIT

SECRET = re.compile("secret|token|password|credential|access_key|api_key", re.IGNORECASE)


def main(arguments: Sequence[str]) -> int:
    """Submits a job. Returns its exit code, or 130 if it was stopped. Raises ArdiffError."""
    parser = submit_parser()
    options = parser.parse_args(arguments)
    if options.job not in jobs():
        parser.error(f"no job '{options.job}': choose one of {', '.join(jobs())}")
    call = read_arguments(options.job, options.arguments)
    folder = Path(options.working_dir).resolve()
    submission = plan(options.job, options.arguments, call, folder, options.env, options.driver_cpus)
    if options.dry_run or call.dry_run:
        _print(submission)
        return 0
    with connection(options.address, options.token_file) as client:
        return run(client, submission, options.detach)


def submit_parser() -> argparse.ArgumentParser:
    """The parser of ``ardiff submit``."""
    parser = argparse.ArgumentParser(
        prog="ardiff submit",
        description="Runs a job on a cluster and follows it. Exits with the job's exit code; Ctrl-C stops the job.",
        epilog=f"Jobs: {', '.join(jobs())}. `ardiff JOB --help` lists the settings of a job.",
    )
    add_connection_options(parser, os.environ.get("RAY_API_SERVER_ADDRESS") or ADDRESS)
    parser.add_argument("--working-dir", metavar="PATH", default=".", help="folder whose code is sent (default: here)")
    parser.add_argument(
        "--env", metavar="NAME=VALUE", action="append", default=[], help="environment variable of the job; no secrets"
    )
    parser.add_argument(
        "--driver-cpus",
        metavar="N",
        type=float,
        default=0.0,
        help="CPUs that the driver reserves on a worker node, so that the job outlives the head of a cluster whose "
        "state is in Redis (default: 0, the driver runs on the head)",
    )
    parser.add_argument("--detach", action="store_true", help="return as soon as the job is accepted")
    parser.add_argument("--dry-run", action="store_true", help="print what would be sent and exit")
    parser.add_argument("job", metavar="JOB", help="a command of `ardiff`")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="arguments of the command")
    return parser


def jobs() -> list[str]:
    """The commands that can be submitted."""
    return [command for command, (module, _, _) in COMMANDS.items() if module.startswith("ray_jobs.")]


def plan(
    job: str,
    arguments: Sequence[str],
    call: Call,
    folder: Path,
    environment: Sequence[str],
    driver_cpus: float = 0.0,
) -> Submission:
    """The submission of a job. Raises ConfigError for settings that cannot work on the cluster."""
    if driver_cpus < 0:
        raise ConfigError(f"--driver-cpus {driver_cpus:g}: give a number of CPUs, 0 or more.")
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder} to send.")
    output = to_dict(call.config).get("output")
    if output is not None and not (storage.is_remote(output) or Path(output).is_absolute()):
        raise ConfigError(
            f"output={output} would be in a temporary folder of the cluster: give s3://..., or an absolute path that "
            "all nodes share."
        )
    env = runtime_env(folder, _config_files(call, folder), **dict(_variable(text) for text in environment))
    metadata = {"job": job, "fingerprint": fingerprint(call.config), "commit": env["env_vars"][COMMIT]}
    return Submission(
        f"{job}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}",
        shlex.join(["python", "-m", COMMANDS[job][0], *arguments]),
        env,
        metadata | ({} if output is None else {"output": output}),
        driver_cpus,
    )


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--env {text}: write NAME=VALUE.")
    if SECRET.search(name):
        raise ConfigError(f"--env {name}: the dashboard would show it to everyone. Give secrets to the nodes instead.")
    return name, value


def _config_files(call: Call, folder: Path) -> list[str]:
    """Paths of the configurations relative to the folder. Raises ConfigError if the job would not find one."""
    names = []
    for file in call.files:
        path = Path(file)
        if path.is_absolute() or not (folder / path).resolve().is_relative_to(folder):
            raise ConfigError(f"--config {file}: give a path relative to {folder} and inside it, as only it is sent.")
        if not (folder / path).exists():
            raise ConfigError(f"--config {file}: there is no such file in {folder}.")
        names += [os.path.normpath(name) for name in (path, *base_files(path))]
    return names


def _print(submission: Submission) -> None:
    print(f"entrypoint: {submission.entrypoint}")
    if submission.driver_cpus:
        print(f"driver: reserves {submission.driver_cpus:g} CPUs")
    print(f"code: {submission.runtime_env['working_dir']}: {' '.join(submission.runtime_env['excludes'])}")
    for title, values in (("environment", submission.runtime_env["env_vars"]), ("metadata", submission.metadata)):
        print(f"{title}: {' '.join(f'{name}={value}' for name, value in values.items())}")
