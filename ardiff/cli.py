"""The ``ardiff`` command: one verb per job, each configured by a YAML file, options and ``key=value`` overrides."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import json
import os
import sys
import textwrap
import traceback
import typing
from typing import Any

from ardiff.config import load_config, to_yaml
from ardiff.errors import ArdiffError, ConfigError

VERBS = {
    "quickstart": ("ray_jobs.quickstart", "QuickstartConfig", "the whole path, from videos to a scored model"),
    "prepare": ("ray_jobs.prepare", "PrepareConfig", "list and probe videos, or draw the synthetic set"),
    "train-vae": ("ray_jobs.train_vae", "TrainVAEConfig", "train the AR-VAE on clips"),
    "encode": ("ray_jobs.encode_latents", "EncodeConfig", "encode clips to latents with a trained AR-VAE"),
    "train-dit": ("ray_jobs.train_dit", "TrainDiTConfig", "train the AR-DiT on latents"),
    "generate": ("ray_jobs.generate", "GenerateConfig", "generate videos with a trained pipeline"),
    "export": ("ardiff.train.export", "ExportConfig", "make a usable model of a training checkpoint"),
    "evaluate": ("ray_jobs.evaluate", "EvaluateConfig", "score generated videos against real ones"),
    "compare": ("ardiff.metrics.compare", "CompareConfig", "put scores of one protocol side by side"),
    "weights": ("ardiff.metrics.weights", "WeightsConfig", "list or fetch the weights of feature networks"),
    "estimate": ("ardiff.train.estimate", "EstimateConfig", "memory and time of a training step per ZeRO stage"),
}

DOCTOR = "say what this machine has and what is missing"


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns 0, or 1 for a job that failed, 2 for a wrong call, 130 for an interruption."""
    arguments = sys.argv[1:] if argv is None else argv
    debug = "--debug" in arguments
    try:
        return _dispatch([a for a in arguments if a != "--debug"], debug)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on where this one stopped.", file=sys.stderr)
        return 130
    except ArdiffError as error:
        if debug:
            traceback.print_exc()
        print(f"ardiff: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def _dispatch(arguments: list[str], debug: bool) -> int:
    if debug:
        os.environ["ARDIFF_DEBUG"] = "1"
    verb = arguments[0] if arguments else ""
    if verb == "doctor":
        from ardiff.doctor import examine

        argparse.ArgumentParser(prog="ardiff doctor", description=f"{DOCTOR}.").parse_args(arguments[1:])
        return examine()
    if verb not in VERBS:
        _top_parser().parse_args(arguments)
        return 2
    module_name, class_name, summary = VERBS[verb]
    module = importlib.import_module(module_name)
    config_class = getattr(module, class_name)
    parser = _verb_parser(verb, summary, config_class, getattr(module, "ALIASES", {}))
    options, rest = parser.parse_known_intermixed_args(arguments[1:])
    if rest:
        parser.error(f"unknown option {rest[0]}")
    given = {n.removeprefix("set_"): v for n, v in vars(options).items() if n.startswith("set_") and v is not None}
    named, rest = list(getattr(module, "POSITIONALS", ())), options.overrides
    while named and rest and "=" not in rest[0]:
        given[named.pop(0)], *rest = rest
    if hasattr(module, "REMAINING"):  # the field that takes every further argument
        plain = [a for a in rest if "=" not in a]
        rest = [a for a in rest if "=" in a]
        given |= {module.REMAINING: json.dumps(plain)} if plain else {}
    overrides = [f"{name}={value}" for name, value in given.items()] + rest
    paths = options.config or (module.config_paths(given) if hasattr(module, "config_paths") else None)
    config = load_config(config_class, paths, overrides)
    if options.dry_run:
        print(to_yaml(config), end="")
        return 0
    module.run(config)
    return 0


def _top_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ardiff",
        description="AR-Diffusion: train, sample and score asynchronous auto-regressive video diffusion models on Ray.",
        epilog="`ardiff VERB --help` lists every setting of a verb. --debug shows tracebacks.",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, (_, _, summary) in VERBS.items():
        verbs.add_parser(verb, help=summary, add_help=False)
    verbs.add_parser("doctor", help=DOCTOR, add_help=False)
    return parser


def _verb_parser(verb: str, summary: str, config_class: type[Any], aliases: dict[str, str]) -> argparse.ArgumentParser:
    """Every plain setting is an option, some by a second name; settings of sections are ``section.key=value``."""
    parser = argparse.ArgumentParser(
        prog=f"ardiff {verb}",
        description=f"{summary[0].upper()}{summary[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_sections_help(config_class),
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file's")
    parser.add_argument(
        "--config", metavar="PATH", action="append", help="YAML file, or folder of them; may be repeated"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and the workers' output")
    documentation = _field_documentation(config_class)
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(hints[field.name]):
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
    lines = _describe_sections(config_class, "")
    return "\n".join(["sections (set as key=value, for example train.seed=1):", *lines]) if lines else ""


def _describe_sections(config_class: type[Any], prefix: str) -> list[str]:
    lines: list[str] = []
    hints = typing.get_type_hints(config_class)
    documentation = _field_documentation(config_class)
    for field in dataclasses.fields(config_class):
        hint, key = hints[field.name], f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hint):
            inner = _describe_sections(typing.cast(type, hint), f"{key}.")
            lines += ["", f"  {key}: {documentation[field.name]}", *inner]
        elif prefix:
            text = f"{documentation[field.name]} Default: {_default(field)}."
            lines += textwrap.wrap(f"{key}: {text}", 110, initial_indent="    ", subsequent_indent="        ")
    return lines


def _field_documentation(config_class: type[Any]) -> dict[str, str]:
    """The string below each field of a configuration class, on one line."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body[0]
    assert isinstance(tree, ast.ClassDef)
    documentation: dict[str, str] = {}
    for statement, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = ""
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                text = " ".join(str(following.value.value).split()).replace("``", "")
            documentation[statement.target.id] = text
    return documentation


def _default(field: dataclasses.Field[Any]) -> str:
    return "none" if field.default is None else str(field.default)
