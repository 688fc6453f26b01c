"""The arguments of a command: every field of its configuration class is an option or a ``section.key=value``.

A command's module may define:

- ``POSITIONALS``: fields that positional arguments fill, in order.
- ``REMAINING``: the field that takes all further positional arguments.
- ``ALIASES``: second names of options, by field.
- ``CONFIG_FIRST``: whether the first positional argument is a configuration file.
- ``config_paths(given)``: the configuration files without ``--config``.

Every command also has a section ``storage``, a :class:`StorageConfig`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ardiff import logs
from ardiff.config import COMMAND, build, field_documentation, kind_of, read_settings, section_classes, take_section
from ardiff.data.config import StorageConfig
from ardiff.errors import ConfigError
from ardiff.resolution import Resolution


@dataclass(frozen=True, slots=True)
class Call:
    """A command with its parsed arguments."""

    module: ModuleType
    config: Any
    """The complete configuration of the command."""
    storage: StorageConfig
    files: Sequence[str]
    """The configuration files that were named."""
    dry_run: bool
    log: str | None
    """``text`` or ``json``, if given."""


def read_call(
    command: str, module: ModuleType, config_class: type[Any], parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> Call:
    """Parses the arguments of a command. Raises ConfigError; exits with 2 for an unknown option."""
    options, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        parser.error(f"unknown option {unknown[0]}")
    given = {n.removeprefix("set_"): v for n, v in vars(options).items() if n.startswith("set_") and v is not None}
    positionals, rest = list(getattr(module, "POSITIONALS", ())), options.overrides
    while positionals and rest and "=" not in rest[0]:
        given[positionals.pop(0)], *rest = rest
    files = list(options.config or ())
    if getattr(module, "CONFIG_FIRST", False) and rest and "=" not in rest[0]:
        files.append(rest.pop(0))
    if hasattr(module, "REMAINING"):
        remaining = [a for a in rest if "=" not in a]
        rest = [a for a in rest if "=" in a]
        given |= {module.REMAINING: json.dumps(remaining)} if remaining else {}
    overrides = [f"{name}={value}" for name, value in given.items()] + rest
    paths = files or (module.config_paths(given) if hasattr(module, "config_paths") else None)
    settings = read_settings(paths, overrides)
    if (named := settings.pop(COMMAND, command)) != command:
        raise ConfigError(f"{', '.join(files)} is a configuration of `ardiff {named}`, not of `ardiff {command}`.")
    storage = take_section(StorageConfig, settings, "storage")
    return Call(module, build(config_class, settings), storage, files, options.dry_run, options.log)


def command_parser(command: str, summary: str, module: ModuleType, config_class: type[Any]) -> argparse.ArgumentParser:
    """The parser of a command. Its help lists every setting with the docstring of its field."""
    parser = argparse.ArgumentParser(
        prog=f"ardiff {command}",
        description=f"{summary[0].upper()}{summary[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_sections_help(config_class),
    )
    metavar, first = "key=value", ""
    if getattr(module, "CONFIG_FIRST", False):
        metavar, first = "FILE | key=value", "a configuration file, then "
    parser.add_argument("overrides", nargs="*", metavar=metavar, help=f"{first}settings that override the file")
    parser.add_argument(
        "--config", metavar="PATH", action="append", help="YAML file, or folder of YAML files; may be repeated"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and the output of workers")
    text = f"log format; json writes one object per line for log collectors (default: ${logs.FORMAT}, or text)"
    parser.add_argument("--log", choices=("text", "json"), help=text)
    aliases = getattr(module, "ALIASES", {})
    documentation = field_documentation(config_class)
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if section_classes(hints[field.name]) or "from_input" in field.metadata:  # a section, or not a setting
            continue
        flag = f"--{field.name.replace('_', '-')}"
        text = _help_text(field, documentation).replace("%", "%%")
        dest = f"set_{field.name}"
        if hints[field.name] is bool:
            parser.add_argument(flag, dest=dest, action="store_const", const="true", help=text)
        else:
            flags = [flag, f"--{aliases[field.name]}"] if field.name in aliases else [flag]
            parser.add_argument(*flags, dest=dest, metavar="VALUE", help=text)
    return parser


def _sections_help(config_class: type[Any]) -> str:
    title = "sections (set as key=value, for example storage.region=eu-west-1):"
    storage = _section_help(StorageConfig, "storage", "How to reach S3.")
    return "\n".join([title, *_fields_help(config_class, ""), *storage])


def _section_help(hint: Any, key: str, documentation: str) -> list[str]:
    """The fields of a section. If it is a union of classes, the fields in which the others differ from the first."""
    first, *others = section_classes(hint)
    lines = ["", f"  {key}: {documentation}", *_fields_help(first, f"{key}.")]
    for other in others:
        lines += ["", f"  {key}, with {key}.kind={kind_of(other)}:", *_fields_help(other, f"{key}.", first)]
    return lines


def _fields_help(config_class: type[Any], prefix: str, base: type[Any] | None = None) -> list[str]:
    """Help on each field, except those inherited from ``base``."""
    lines: list[str] = []
    inherited = () if base is None else dataclasses.fields(base)
    hints = typing.get_type_hints(config_class)
    documentation = field_documentation(config_class)
    for field in (f for f in dataclasses.fields(config_class) if f not in inherited):
        hint, key = hints[field.name], f"{prefix}{field.name}"
        if section_classes(hint):
            lines += _section_help(hint, key, documentation[field.name])
        elif prefix:
            text = _help_text(field, documentation)
            lines += textwrap.wrap(f"{key}: {text}", 110, initial_indent="    ", subsequent_indent="        ")
    return lines


def _help_text(field: dataclasses.Field[Any], documentation: dict[str, str]) -> str:
    """The documentation of a field, its valid names if its metadata has ``choices``, a function, and its default."""
    choices = f" One of: {', '.join(field.metadata['choices']())}." if "choices" in field.metadata else ""
    return f"{documentation[field.name]}{choices} Default: {_default(field)}."


def _default(field: dataclasses.Field[Any]) -> str:
    default = field.default.plain if isinstance(field.default, Resolution) else field.default
    return "none" if default is None else str(default)
