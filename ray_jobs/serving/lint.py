"""Checks a Ray Serve configuration of the endpoint. Serve itself ignores unknown keys and contradictions.

ardiff lint-serve cluster/overlays/aws/serve_config.yaml
"""

import difflib
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeDeploySchema

from ardiff.cli import main
from ardiff.config import build
from ardiff.data import storage
from ardiff.errors import ConfigError
from ray_jobs.serve import DEPLOYMENT, MAX_REQUESTS, ReplicaConfig, shutdown_seconds

POSITIONALS = ("file",)
IMPORT_PATH = "ray_jobs.serve:application"
EXTENSION = "x-"
"""Prefix of sections that Serve ignores. They hold values for YAML aliases."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LintConfig:
    """The file to check."""

    file: str = "cluster/overlays/aws/serve_config.yaml"
    """The Serve configuration."""


def run(config: LintConfig) -> None:
    """Prints that the file is valid. Raises ConfigError with the first error."""
    lint(Path(config.file))
    print(f"{config.file} is valid.")


def lint(path: Path) -> None:
    """Raises ConfigError with the first unknown key, invalid value or contradiction."""
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if isinstance(tree, dict):
        tree = {key: value for key, value in tree.items() if not str(key).startswith(EXTENSION)}
    _check_keys(ServeDeploySchema, tree, "")
    try:
        ServeDeploySchema.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        path_text = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"'{path_text}': {first['msg']}.") from error
    applications = [app for app in tree["applications"] if app.get("import_path") == IMPORT_PATH]
    if not applications:
        raise ConfigError(f"No application has import_path {IMPORT_PATH}.")
    for app in applications:
        _check_application(app)


def _check_keys(schema: type[BaseModel], tree: Any, path: str) -> None:
    """Raises ConfigError unless every key, at any depth, is a field of Serve's schema."""
    if not isinstance(tree, dict):
        raise ConfigError(f"'{path or 'the file'}' must be a mapping of keys to values.")
    for key, value in tree.items():
        key_path = f"{path}.{key}" if path else str(key)
        if key not in schema.model_fields:
            near = difflib.get_close_matches(str(key), schema.model_fields, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(schema.model_fields)}."
            raise ConfigError(f"Unknown key '{key_path}': {hint}")
        inner = _schema_in(schema.model_fields[key].annotation)
        if inner is not None and value is not None:
            for number, item in enumerate(value if isinstance(value, list) else [value]):
                _check_keys(inner, item, f"{key_path}[{number}]" if isinstance(value, list) else key_path)


def _schema_in(annotation: Any) -> type[BaseModel] | None:
    """The schema of a field's value, or of its items; None if it has none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType):
        return next((schema for part in typing.get_args(annotation) if (schema := _schema_in(part))), None)
    return None


def _check_application(app: dict[str, Any]) -> None:
    config = build(ReplicaConfig, app.get("args", {}), "args")
    if not config.uris:
        raise ConfigError("args: there is no model to serve: give checkpoint, or models by name.")
    if not (config.service.keys or config.service.allow_anonymous):
        raise ConfigError("args.service: give keys, or allow_anonymous: true to serve everyone who reaches it.")
    for deployment in app.get("deployments", []):
        _check_deployment(deployment, config)


def _check_deployment(deployment: dict[str, Any], config: ReplicaConfig) -> None:
    if deployment["name"] != DEPLOYMENT:
        raise ConfigError(f"Unknown deployment '{deployment['name']}': its name is {DEPLOYMENT}.")
    timeout, needed = deployment.get("graceful_shutdown_timeout_s"), shutdown_seconds(config.service)
    if timeout is not None and timeout < needed:
        raise ConfigError(
            f"graceful_shutdown_timeout_s {timeout} ends jobs before drain_seconds {config.service.drain_seconds:g}: "
            f"leave it out, or give at least {needed:g}."
        )
    queued = deployment.get("max_queued_requests", MAX_REQUESTS)
    if 0 <= queued < config.service.max_waiting:
        raise ConfigError(
            f"max_queued_requests {queued} is below max_waiting, so requests are rejected that the queue accepts: give "
            f"at least {config.service.max_waiting}."
        )
    scaling = deployment.get("autoscaling_config")
    if scaling is None:
        replicas = deployment.get("num_replicas") or 1
    else:
        least, replicas = scaling.get("min_replicas", 1), scaling.get("max_replicas", 1)
        if least < 1:
            raise ConfigError("min_replicas must be at least 1: without a replica nothing reads the queue.")
        if replicas < least:
            raise ConfigError(f"max_replicas {replicas} is below min_replicas {least}.")
        if "policy" not in scaling:
            raise ConfigError("autoscaling_config without policy counts requests, not jobs: see docs/serving.md.")
    service, remote = config.service, storage.is_remote(config.service.storage)
    if replicas != 1 and not (remote or service.storage.startswith("/")):
        raise ConfigError(
            f"service.storage {service.storage} must be an absolute path or an s3:// URI that all replicas share."
        )
    if replicas != 1 and not service.is_postgresql and (remote or not service.database_uri.startswith("/")):
        raise ConfigError(
            f"service.database {service.database_uri} is a SQLite file, which the replicas of several machines cannot "
            "share: give postgresql://USER@HOST/NAME, or on one machine an absolute path and a local storage."
        )


if __name__ == "__main__":
    raise SystemExit(main(["lint-serve", *sys.argv[1:]]))
