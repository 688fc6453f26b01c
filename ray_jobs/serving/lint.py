"""Checks a Ray Serve configuration of the endpoint; Serve itself ignores unknown keys and contradictions.

ardiff lint-serve cluster/serve_config.yaml
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
from ray_jobs.serve import DEPLOYMENT, MAX_REQUESTS, ReplicaConfig, grace

POSITIONALS = ("file",)
IMPORT_PATH = "ray_jobs.serve:application"
ASIDE = "x-"
"""Begins the names of sections that hold values for others to refer to, which Serve ignores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LintConfig:
    """What to check."""

    file: str = "cluster/serve_config.yaml"
    """The Serve configuration."""


def run(config: LintConfig) -> None:
    """Prints that the file is right. Raises ConfigError with the first thing that is wrong."""
    lint(Path(config.file))
    print(f"{config.file}: right.")


def lint(path: Path) -> None:
    """Raises ConfigError with the first thing that is wrong: a key, a value, or what contradicts another."""
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if isinstance(tree, dict):
        tree = {key: value for key, value in tree.items() if not str(key).startswith(ASIDE)}
    _check_keys(ServeDeploySchema, tree, "")
    try:
        ServeDeploySchema.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"'{where}': {first['msg']}.") from error
    ours = [app for app in tree["applications"] if app.get("import_path") == IMPORT_PATH]
    if not ours:
        raise ConfigError(f"No application has import_path {IMPORT_PATH}.")
    for app in ours:
        _check_application(app)


def _check_keys(schema: type[BaseModel], tree: Any, where: str) -> None:
    """Every key must be a field of Serve's schema, at every depth that the schema describes."""
    if not isinstance(tree, dict):
        raise ConfigError(f"'{where or 'the file'}' must be a mapping of keys to values.")
    for key, value in tree.items():
        place = f"{where}.{key}" if where else str(key)
        if key not in schema.model_fields:
            near = difflib.get_close_matches(str(key), schema.model_fields, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(schema.model_fields)}."
            raise ConfigError(f"Unknown key '{place}': {hint}")
        inner = _schema_in(schema.model_fields[key].annotation)
        if inner is not None and value is not None:
            for number, item in enumerate(value if isinstance(value, list) else [value]):
                _check_keys(inner, item, f"{place}[{number}]" if isinstance(value, list) else place)


def _schema_in(annotation: Any) -> type[BaseModel] | None:
    """The schema that a field holds, by itself, in a list or optionally."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType):
        found = [schema for part in typing.get_args(annotation) if (schema := _schema_in(part))]
        return found[0] if found else None
    return None


def _check_application(app: dict[str, Any]) -> None:
    config = build(ReplicaConfig, app.get("args", {}), "args")
    if not config.places:
        raise ConfigError("args: there is no model to serve: give checkpoint, or models by name.")
    if not (config.service.keys or config.service.allow_anonymous):
        raise ConfigError("args.service: give keys, or allow_anonymous: true to let everybody in who reaches it.")
    for deployment in app.get("deployments", []):
        _check_deployment(deployment, config)


def _check_deployment(deployment: dict[str, Any], config: ReplicaConfig) -> None:
    if deployment["name"] != DEPLOYMENT:
        raise ConfigError(f"Unknown deployment '{deployment['name']}': its name is {DEPLOYMENT}.")
    given, needed = deployment.get("graceful_shutdown_timeout_s"), grace(config.service)
    if given is not None and given < needed:
        raise ConfigError(
            f"graceful_shutdown_timeout_s {given} cuts off jobs that drain_seconds {config.service.drain_seconds:g} "
            f"waits for: leave it out, or give at least {needed:g}."
        )
    queued = deployment.get("max_queued_requests", MAX_REQUESTS)
    if 0 <= queued < config.service.max_waiting:
        raise ConfigError(
            f"max_queued_requests {queued} refuses requests that max_waiting {config.service.max_waiting} accepts: "
            f"at least {config.service.max_waiting}."
        )
    scaling = deployment.get("autoscaling_config")
    if scaling is None:
        replicas = deployment.get("num_replicas") or 1
    else:
        least, replicas = scaling.get("min_replicas", 1), scaling.get("max_replicas", 1)
        if least < 1:
            raise ConfigError("min_replicas must be at least 1: without a replica nobody looks at the queue.")
        if replicas < least:
            raise ConfigError(f"max_replicas {replicas} is below min_replicas {least}.")
        if "policy" not in scaling:
            raise ConfigError("autoscaling_config without policy counts requests, not jobs: see docs/serving.md.")
    if replicas != 1 and not storage.is_remote(config.service.storage) and not config.service.storage.startswith("/"):
        raise ConfigError(f"service.storage {config.service.storage} must be a place that all replicas share.")


if __name__ == "__main__":
    raise SystemExit(main(["lint-serve", *sys.argv[1:]]))
