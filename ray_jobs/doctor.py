"""``ardiff doctor --address URL``: checks a cluster, by a job that examines every node.

ardiff doctor --address http://127.0.0.1:8265 --storage s3://bucket/doctor --workers 2
"""

import argparse
import secrets
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from ardiff.doctor import Finding, examine, print_findings
from ardiff.serving.config import check_postgresql
from ray_jobs.diagnostics.all_reduce import check_all_reduce
from ray_jobs.diagnostics.nodes import (
    Shared,
    check_clocks,
    check_database,
    check_drivers,
    check_gpus,
    check_object_stores,
    check_storage,
    check_versions,
    examine_nodes,
)
from ray_jobs.runtime.cluster import ray_cluster
from ray_jobs.runtime.job_client import Submission, add_connection_options, connection, run, runtime_env


def main(arguments: Sequence[str]) -> int:
    """Checks this machine, or a cluster if an address is given. Returns 0 if all checks pass, else 1."""
    parser = argparse.ArgumentParser(
        prog="ardiff doctor", description="Checks this machine, or with --address a cluster, and says what to fix."
    )
    add_connection_options(parser, default=None)
    _add_check_options(parser)
    options = parser.parse_args(arguments)
    if options.address is None:
        return examine()
    if options.database is not None:
        try:
            check_postgresql(options.database)
        except ValueError as error:
            parser.error(str(error))
    forwarded = [f"--{name}={getattr(options, name)}" for name in ("workers", "megabytes", "patience", "gpus")]
    references = {"storage": options.storage, "database": options.database}
    references["database-password"] = options.database_password
    forwarded += [f"--{name}={value}" for name, value in references.items() if value is not None]
    client = f"{sys.version_info[0]}.{sys.version_info[1]}/{metadata.version('ray')}"
    entrypoint = shlex.join(["python", "-m", "ray_jobs.doctor", *forwarded, f"--client={client}"])
    submission = Submission(
        f"doctor-{secrets.token_hex(4)}", entrypoint, runtime_env(Path.cwd(), ()), {"job": "doctor"}
    )
    with connection(options.address, options.token_file) as job_client:
        return run(job_client, submission, quiet=True)


def _add_check_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--storage", metavar="URI", help="folder, s3:// or shared, that every node must write to")
    parser.add_argument("--database", metavar="URI", help="postgresql://USER@HOST/NAME, which every node must reach")
    parser.add_argument("--database-password", metavar="REF", help="env:NAME or a file on the nodes")
    parser.add_argument("--workers", type=int, default=2, help="workers of the timed all-reduce (2)")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs to wait for, with an autoscaler (0)")
    parser.add_argument("--megabytes", type=int, default=64, help="size of the all-reduce in MiB (64)")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds to wait for the workers (300)")


def check_cluster(arguments: Sequence[str]) -> int:
    """The job on the cluster. Returns 0 if all checks pass, else 1."""
    parser = argparse.ArgumentParser()
    _add_check_options(parser)
    parser.add_argument("--client", required=True, help="Python and Ray of the machine that asks")
    options = parser.parse_args(arguments)
    with ray_cluster():
        shared = Shared(options.storage, options.database, options.database_password)
        nodes = examine_nodes(shared, options.gpus)
        findings = [
            Finding("nodes", True, f"{len(nodes)}: {', '.join(node.name for node in nodes)}"),
            check_versions(nodes, options.client),
            check_gpus(nodes, options.gpus),
            *check_drivers(nodes),
            *check_object_stores(nodes),
            check_clocks(nodes),
            check_storage(nodes, options.storage),
            check_database(nodes, options.database),
            check_all_reduce(nodes, options.workers, options.megabytes, options.patience),
        ]
    return print_findings(findings, "FIX")


if __name__ == "__main__":
    raise SystemExit(check_cluster(sys.argv[1:]))
