"""The ``ardiff`` command: one verb per job, each configured by a YAML file, options and ``key=value`` overrides.

A section ``storage`` beside the verb's own settings says how ``s3://`` places are reached; every verb has it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import logging
import os
import sys
import textwrap
import traceback
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import yaml

from ardiff import logs
from ardiff.config import (
    VERB,
    build,
    field_documentation,
    kind_of,
    read_settings,
    section_classes,
    take_section,
    to_dict,
    to_yaml,
)
from ardiff.data import s3
from ardiff.data.s3 import StorageConfig
from ardiff.errors import ArdiffError, ConfigError

logger = logging.getLogger(__name__)
VERBS = {
    "quickstart": ("ray_jobs.quickstart", "QuickstartConfig", "the whole path, from videos to a scored model"),
    "prepare": ("ray_jobs.prepare", "PrepareConfig", "list and probe videos, or draw the synthetic set"),
    "train-vae": ("ray_jobs.train_vae", "TrainVAEConfig", "train the AR-VAE on clips"),
    "encode": ("ray_jobs.encode", "EncodeConfig", "encode clips to latents with a trained AR-VAE"),
    "train-dit": ("ray_jobs.train_dit", "TrainDiTConfig", "train the AR-DiT on latents"),
    "generate": ("ray_jobs.generate", "GenerateConfig", "generate videos with a trained pipeline"),
    "sweep": ("ray_jobs.sweep", "SweepConfig", "generate a grid of videos, score every cell, and report"),
    "export": ("ardiff.train.export", "ExportConfig", "make a usable model of a training checkpoint"),
    "import-upstream": ("ardiff.import_upstream", "ImportConfig", "make a pipeline of the authors' checkpoints"),
    "evaluate": ("ray_jobs.evaluate", "EvaluateConfig", "score generated videos against real ones"),
    "compare": ("ardiff.metrics.compare", "CompareConfig", "put scores of one protocol side by side"),
    "weights": ("ardiff.metrics.weights", "WeightsConfig", "list or fetch the weights of feature networks"),
    "serve": ("ray_jobs.serve", "ServeConfig", "an HTTP service and a page that generate videos"),
    "lint-serve": ("ray_jobs.serving.lint", "LintConfig", "check a Ray Serve configuration before it is deployed"),
    "api-key": ("ardiff.serving.keys", "ApiKeyConfig", "make an API key for the service"),
    "ablate": ("ray_jobs.ablate", "AblateConfig", "train variants of the quickstart's recipe and compare them"),
    "estimate": ("ardiff.train.estimate", "EstimateConfig", "memory and time per ZeRO stage, and what the jobs cost"),
}

OTHERS = {
    "submit": ("ray_jobs.submit", "run one of the jobs on a cluster, from here"),
    "client": ("ardiff.client", "ask a running service for videos"),
    "doctor": ("ray_jobs.doctor", "say what this machine or a cluster has and what is missing"),
}
"""Verbs that are not configured but have options of their own."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns 0, or 1 for a job that failed, 2 for a wrong call, 130 for an interruption."""
    arguments = sys.argv[1:] if argv is None else argv
    debug = "--debug" in arguments
    try:
        return _dispatch([a for a in arguments if a != "--debug"], debug)
    except KeyboardInterrupt:
        _complain("Interrupted. The same command goes on where this one stopped (without resume=none).", "\n")
        return 130
    except ArdiffError as error:
        if debug:
            traceback.print_exc()
        _complain(str(error), "ardiff: ")
        return 2 if isinstance(error, ConfigError) else 1


def _complain(message: str, before: str) -> None:
    """Says why the command ends: a line of the log if it is JSON, else a sentence to the user."""
    if logs.begun():
        logger.error("%s", message)
    else:
        print(f"{before}{message}", file=sys.stderr)


def _dispatch(arguments: list[str], debug: bool) -> int:
    if debug:
        os.environ["ARDIFF_DEBUG"] = "1"
    verb = arguments[0] if arguments else ""
    if arguments == ["doctor"]:
        from ardiff.doctor import examine

        return examine()
    if verb in OTHERS:
        code: int = importlib.import_module(OTHERS[verb][0]).main(arguments[1:])
        return code
    if verb not in VERBS:
        _top_parser().parse_args(arguments)
        return 2
    call = read_arguments(verb, arguments[1:])
    if call.dry_run:
        print(to_yaml(call.config), end="")
        if call.storage != StorageConfig():
            print(yaml.safe_dump({"storage": to_dict(call.storage)}, sort_keys=False), end="")
        if hasattr(call.module, "describe_plan"):
            s3.configure(call.storage)
            print(textwrap.indent(call.module.describe_plan(call.config), "# "))
        return 0
    if call.log:
        os.environ[logs.FORMAT] = call.log
    logs.begin(verb, to_dict(call.config).get("output"))
    s3.configure(call.storage)
    call.module.run(call.config)
    return 0


@dataclass(frozen=True, slots=True)
class Call:
    """A verb with its arguments read."""

    module: ModuleType
    config: Any
    """The verb's configuration, complete."""
    storage: StorageConfig
    """How ``s3://`` places are reached."""
    files: Sequence[str]
    """What was given as ``--config``."""
    dry_run: bool
    log: str | None
    """``text`` or ``json``, where it was given."""


def read_arguments(verb: str, arguments: Sequence[str]) -> Call:
    """Reads what follows one of the ``VERBS``. Raises ConfigError; exits with 2 for an unknown option."""
    module_name, class_name, summary = VERBS[verb]
    module = importlib.import_module(module_name)
    config_class = getattr(module, class_name)
    config_first = getattr(module, "CONFIG_FIRST", False)
    parser = _verb_parser(verb, summary, config_class, getattr(module, "ALIASES", {}), config_first)
    options, rest = parser.parse_known_intermixed_args(arguments)
    if rest:
        parser.error(f"unknown option {rest[0]}")
    given = {n.removeprefix("set_"): v for n, v in vars(options).items() if n.startswith("set_") and v is not None}
    named, rest = list(getattr(module, "POSITIONALS", ())), options.overrides
    while named and rest and "=" not in rest[0]:
        given[named.pop(0)], *rest = rest
    files = list(options.config or ())
    if config_first and rest and "=" not in rest[0]:
        files.append(rest.pop(0))
    if hasattr(module, "REMAINING"):  # the field that takes every further argument
        plain = [a for a in rest if "=" not in a]
        rest = [a for a in rest if "=" in a]
        given |= {module.REMAINING: json.dumps(plain)} if plain else {}
    overrides = [f"{name}={value}" for name, value in given.items()] + rest
    paths = files or (module.config_paths(given) if hasattr(module, "config_paths") else None)
    settings = read_settings(paths, overrides)
    if settings.pop(VERB, verb) != verb:
        raise ConfigError(f"{', '.join(files)} is the configuration of another verb than {verb}.")
    reach = take_section(StorageConfig, settings, "storage")
    return Call(module, build(config_class, settings), reach, files, options.dry_run, options.log)


def _top_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ardiff",
        description="AR-Diffusion: train, sample and score asynchronous auto-regressive video diffusion models on Ray.",
        epilog="`ardiff VERB --help` lists every setting of a verb. --debug shows tracebacks.",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, (_, _, summary) in VERBS.items():
        verbs.add_parser(verb, help=summary, add_help=False)
    for verb, (_, summary) in OTHERS.items():
        verbs.add_parser(verb, help=summary, add_help=False)
    return parser


def _verb_parser(
    verb: str, summary: str, config_class: type[Any], aliases: dict[str, str], config_first: bool
) -> argparse.ArgumentParser:
    """Every plain setting is an option, some by a second name; settings of sections are ``section.key=value``."""
    parser = argparse.ArgumentParser(
        prog=f"ardiff {verb}",
        description=f"{summary[0].upper()}{summary[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_sections_help(config_class),
    )
    metavar, lead = ("FILE | key=value", "like --config, then ") if config_first else ("key=value", "")
    parser.add_argument("overrides", nargs="*", metavar=metavar, help=f"{lead}settings that override the file's")
    parser.add_argument(
        "--config", metavar="PATH", action="append", help="YAML file, or folder of them; may be repeated"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and the workers' output")
    text = f"how to log, a JSON object a line for what collects logs (default: ${logs.FORMAT}, or text)"
    parser.add_argument("--log", choices=("text", "json"), help=text)
    documentation = field_documentation(config_class)
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if section_classes(hints[field.name]):
            continue
        flag = f"--{field.name.replace('_', '-')}"
        text = f"{documentation[field.name]} Default: {_default(field)}.".replace("%", "%%")
        dest = f"set_{field.name}"
        if hints[field.name] is bool:
            parser.add_argument(flag, dest=dest, action="store_const", const="true", help=text)
        else:
            flags = [flag, f"--{aliases[field.name]}"] if field.name in aliases else [flag]
            parser.add_argument(*flags, dest=dest, metavar="VALUE", help=text)
    return parser


def _sections_help(config_class: type[Any]) -> str:
    lines = [*_describe_sections(config_class, ""), *_describe_section(StorageConfig, "storage", "How S3 is reached.")]
    return "\n".join(["sections (set as key=value, for example storage.region=eu-west-1):", *lines])


def _describe_section(hint: Any, key: str, documentation: str) -> list[str]:
    """The settings of a section; if it is one of several classes, what the others add to the first or change in it."""
    first, *others = section_classes(hint)
    lines = ["", f"  {key}: {documentation}", *_describe_sections(first, f"{key}.")]
    for other in others:
        lines += ["", f"  {key}, with {key}.kind={kind_of(other)}:", *_describe_sections(other, f"{key}.", first)]
    return lines


def _describe_sections(config_class: type[Any], prefix: str, base: type[Any] | None = None) -> list[str]:
    """A line or more for each field, except those that ``base`` has too."""
    lines: list[str] = []
    hints = typing.get_type_hints(config_class)
    documentation = field_documentation(config_class)
    inherited = () if base is None else dataclasses.fields(base)
    for field in (f for f in dataclasses.fields(config_class) if f not in inherited):
        hint, key = hints[field.name], f"{prefix}{field.name}"
        if section_classes(hint):
            lines += _describe_section(hint, key, documentation[field.name])
        elif prefix:
            text = f"{documentation[field.name]} Default: {_default(field)}."
            lines += textwrap.wrap(f"{key}: {text}", 110, initial_indent="    ", subsequent_indent="        ")
    return lines


def _default(field: dataclasses.Field[Any]) -> str:
    return "none" if field.default is None else str(field.default)
