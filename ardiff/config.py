"""Typed, strict configuration: frozen dataclasses filled from YAML and dotted overrides.

A configuration is one dataclass whose fields are values or further dataclasses. It is read from a YAML file, or from a
folder with one YAML file per field, and then changed by overrides such as ``train.lr=1e-4``. A file may overlay
another one: ``base: ../paper/train_dit.yaml`` reads that file first. Every key must be a field and every value must
have the field's type. An error names the path of the key and the nearest valid name.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import hashlib
import inspect
import json
import os
import sys
import textwrap
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from ardiff.errors import ConfigError
from ardiff.resolution import Resolution

ConfigT = TypeVar("ConfigT")
CONFIGS = "ARDIFF_CONFIGS"
"""Environment variable: the folder of the shipped configurations, if it is not beside the package, as in the image of
a cluster's nodes."""
COMMAND = "command"
"""Key that names the command of a configuration file. Such a file is complete; it is not a part of its folder."""
BASE = "base"
"""Key of a file that overlays another file: the path of that file, relative to the folder of this one."""


def load_config(
    cls: type[ConfigT], paths: Sequence[str | Path] | None = None, overrides: Sequence[str] = ()
) -> ConfigT:
    """Reads a configuration of class ``cls``.

    Args:
        cls: A dataclass. Fields without a default must be given.
        paths: YAML files, or folders with one ``<field>.yaml`` per field. Later paths override earlier ones, key by
            key. None means defaults only.
        overrides: ``key.path=value`` strings, applied in order; values are read as YAML.

    Raises:
        ConfigError: A file cannot be read, a key is unknown, or a value has the wrong type or is invalid.
    """
    return build(cls, read_settings(paths, overrides))


def read_settings(paths: Sequence[str | Path] | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of files and overrides as nested dicts, not validated; see :func:`load_config`."""
    tree: dict[str, Any] = {}
    for path in paths or []:
        _merge(tree, _read_tree(_resolve(Path(path))))
    for override in overrides:
        _apply_override(tree, override)
    return tree


def _resolve(path: Path) -> Path:
    """The path itself, or the shipped configuration if it is ``configs/NAME`` and there is none in this folder.

    So the commands of the documentation work without a checkout.
    """
    is_shipped = len(path.parts) > 1 and path.parts[0] == "configs" and not path.exists()
    return find_config(str(Path(*path.parts[1:]))) if is_shipped else path


def take_section(cls: type[ConfigT], tree: dict[str, Any], name: str) -> ConfigT:
    """Removes the section ``name`` from ``tree`` and builds the dataclass ``cls`` from it. Raises ConfigError."""
    section: ConfigT = _coerce(cls, tree.pop(name, {}), name)
    return section


def section_classes(hint: Any) -> tuple[type[Any], ...]:
    """The dataclasses that a section of type ``hint`` may be; empty if the type is no section.

    A section may be a union of dataclasses. Its key ``kind`` chooses one by their defaults; the first is the default.
    """
    classes = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return classes if all(dataclasses.is_dataclass(cls) for cls in classes) else ()


def kind_of(cls: type[Any]) -> str:
    """The default of the field ``kind``, which tells the dataclasses of a union apart."""
    return str(next(f.default for f in dataclasses.fields(cls) if f.name == "kind"))


def _choose_class(hint: Any, tree: dict[str, Any], prefix: str) -> type[Any]:
    first, *others = section_classes(hint)
    if not others:
        return first
    kinds = {kind_of(cls): cls for cls in (first, *others)}
    kind = tree.get("kind", next(iter(kinds)))
    if kind not in list(kinds):
        raise ConfigError(f"'{_join(prefix, 'kind')}' must be one of {', '.join(kinds)}, not {kind!r}.")
    return kinds[kind]


def build(cls: type[ConfigT], tree: dict[str, Any], prefix: str = "") -> ConfigT:
    """Builds the dataclass ``cls``, or one of a union of them, from nested dicts. Raises ConfigError.

    Checks every key and type.
    """
    cls = _choose_class(cls, tree, prefix)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), list(fields), n=1)
            hint = f"did you mean '{_join(prefix, near[0])}'?" if near else f"valid keys: {', '.join(fields)}."
            raise ConfigError(f"Unknown configuration key '{_join(prefix, str(key))}': {hint}")
        values[key] = _coerce(hints[key], value, _join(prefix, key))
    missing = [
        _join(prefix, name)
        for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"Missing configuration value(s): {', '.join(missing)}. Set them in a file or as key=value.")
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{prefix or cls.__name__}: {error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as nested dicts of plain values, for YAML or JSON.

    A field whose metadata has ``omit_default`` is left out at its default. A field that is added to a stored
    configuration has it, so that files and fingerprints of before stay what they are.
    """
    result: dict[str, Any] = _plain(config)
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, Resolution):
        return value.plain
    if dataclasses.is_dataclass(value):
        fields = {f.name: (f, getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {
            name: _plain(content)
            for name, (f, content) in fields.items()
            if not (f.metadata.get("omit_default") and content == f.default)
        }
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def to_yaml(config: Any) -> str:
    """The configuration as YAML text, in the order of the fields."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, width=110)


def field_documentation(config_class: type[Any]) -> dict[str, str]:
    """The docstring of each field of a dataclass and its bases, on one line, for ``--help`` and the HTTP API."""
    documentation: dict[str, str] = {}
    for cls in filter(dataclasses.is_dataclass, reversed(config_class.__mro__)):
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for statement, following in zip(tree.body, [*tree.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                text = ""
                if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                    text = " ".join(str(following.value.value).split()).replace("``", "")
                documentation[statement.target.id] = text
    return documentation


def fingerprint(*parts: Any) -> str:
    """16 hex digits of a hash of ``parts`` (dataclasses or JSON values). Equal values have equal fingerprints."""
    text = json.dumps(_plain(parts), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def find_config(name: str) -> Path:
    """The path of a shipped configuration such as ``quickstart`` or ``quickstart/vae.yaml``.

    Searches ``./configs``, then ``$ARDIFF_CONFIGS``, or without it the folder beside the package's checkout, then the
    folder that the wheel installs. Raises ConfigError if there is no such file.
    """
    beside = Path(__file__).resolve().parent.parent / "configs"
    installed = Path(sys.prefix) / "share" / "ardiff" / "configs"
    for root in (Path.cwd() / "configs", Path(os.environ.get(CONFIGS, beside)), installed):
        if (candidate := root / name).exists():
            return candidate
    raise ConfigError(
        f"There is no configuration 'configs/{name}' here or beside the package: give its path with --config."
    )


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


def _read_tree(path: Path) -> dict[str, Any]:
    if path.is_dir():
        files = sorted(path.glob("*.yaml"))
        if not files:
            raise ConfigError(f"The configuration folder {path} has no .yaml file.")
        trees = {file.stem: _read_tree(file) for file in files}
        return {name: tree for name, tree in trees.items() if COMMAND not in tree}
    return _read_file(path)


def _read_file(path: Path, overlays: Sequence[Path] = ()) -> dict[str, Any]:
    """The settings of a file over those of its base. ``overlays``: the files that this one is the base of."""
    settings = _load_yaml(path)
    if BASE not in settings:
        return settings
    base = path.parent / str(settings.pop(BASE))
    if base.resolve() in overlays:
        raise ConfigError(f"{path} has itself as its base.")
    tree = _read_file(base, [*overlays, path.resolve()])
    _merge(tree, settings)
    return tree


def base_files(path: Path) -> list[Path]:
    """The files that a configuration file, or the files of a folder, overlay, with their own bases."""
    if path.is_dir():
        return [base for file in sorted(path.glob("*.yaml")) for base in base_files(file)]
    settings = _load_yaml(path)
    if BASE not in settings:
        return []
    base = path.parent / str(settings[BASE])
    return [base, *base_files(base)]


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"Cannot read the configuration {path}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, not a {type(tree).__name__}.")
    return tree


def _merge(tree: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"'{override}' is not an override: write key.path=value.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"The value of override '{override}' is not valid YAML.") from error
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"'{override}': '{parent}' is a value, not a section.")
    tree[last] = value


def _coerce(hint: Any, value: Any, prefix: str) -> Any:
    """Converts ``value`` to the type ``hint``.

    A string becomes a float (PyYAML reads ``1e-4`` as a string), or a list of strings, split at commas.
    """
    origin, args = get_origin(hint), get_args(hint)
    if section_classes(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"'{prefix}' is a section with its own keys, not {value!r}.")
        return build(hint, value, prefix)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        inner = [a for a in args if a is not type(None)]
        if len(inner) == 1:
            return _coerce(inner[0], value, prefix)
        raise TypeError(f"{prefix}: configuration fields may be optional but not unions, got {hint}")
    if hint is Resolution:
        try:
            return Resolution.parse(value)
        except ValueError as error:
            raise ConfigError(f"'{prefix}' {error}.") from error
    if origin is Literal:
        if value is False and "off" in args:  # YAML 1.1 reads the word so
            return "off"
        if value not in args:
            raise ConfigError(f"'{prefix}' must be one of {', '.join(map(str, args))}, not {value!r}.")
        return value
    if origin is tuple:
        if isinstance(value, str) and (args[0] is str or get_origin(args[0]) is Literal):  # as on a command line
            value = [part.strip() for part in value.split(",")]
        if not isinstance(value, list | tuple):
            raise ConfigError(f"'{prefix}' must be a list, not {value!r}.")
        return tuple(_coerce(args[0], item, f"{prefix}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"'{prefix}' must be a mapping, not {value!r}.")
        return value
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif hint is int and isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0:
        return int(value)
    elif hint in (bool, str) and isinstance(value, hint):
        return value
    raise ConfigError(f"'{prefix}' must be of type {getattr(hint, '__name__', hint)}, not {value!r}.")
