"""Shipped configuration files load, and every setting is read by some code."""

import ast
import dataclasses
import importlib
import pkgutil
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ardiff
import ray_jobs
from ardiff.cli import COMMANDS
from ardiff.config import COMMAND, build, field_documentation, load_config, read_settings, section_classes
from ardiff.data.config import StorageConfig
from ray_jobs.quickstart import QuickstartConfig
from ray_jobs.serve import ReplicaConfig

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
STEM_OF_COMMAND = {command: command.replace("-", "_") for command in COMMANDS}


def config_class(command: str) -> type[Any]:
    module, name, _ = COMMANDS[command]
    return getattr(importlib.import_module(module), name)


def nested(cls: type[Any]) -> Iterator[type[Any]]:
    """The class and all configuration classes of its fields."""
    yield cls
    for hint in typing.get_type_hints(cls).values():
        for section in section_classes(hint):
            yield from nested(section)


# ReplicaConfig comes from a Serve configuration, not from a command. Every command has the section StorageConfig.
ROOTS = [*map(config_class, COMMANDS), ReplicaConfig, StorageConfig]
ALL_CLASSES = sorted({c for root in ROOTS for c in nested(root)}, key=lambda c: c.__qualname__)


def test_the_quickstart_folders_load() -> None:
    plain = load_config(QuickstartConfig, [CONFIGS / "quickstart"])
    fast = load_config(QuickstartConfig, [CONFIGS / "quickstart", CONFIGS / "quickstart_fast"])
    assert fast.train_dit.train.num_steps < plain.train_dit.train.num_steps
    assert fast.train_dit.dit == plain.train_dit.dit
    assert fast.train_vae.vae == plain.train_vae.vae


def test_the_quickstart_models_fit_together() -> None:
    for folders in (["quickstart"], ["quickstart", "quickstart_fast"]):
        config = load_config(QuickstartConfig, [CONFIGS / folder for folder in folders])
        vae, dit = config.train_vae.vae, config.train_dit.dit
        assert (vae.num_tokens, vae.token_dim) == (dit.num_tokens, dit.token_dim)
        assert config.encode.num_frames <= dit.num_frames
        assert config.train_vae.task.temporal_from_step < config.train_vae.train.num_steps


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(CONFIGS)))
def test_every_file_is_a_configuration(file: Path) -> None:
    """A file of a quickstart folder is a field of the quickstart, unless it names its command. Any other file is named
    like its command (``train_vae``, ``train_vae_1_frames``)."""
    settings = read_settings([file])
    if command := settings.pop(COMMAND, None):
        build(config_class(command), settings)
        return
    if file.parent.name.startswith("quickstart"):
        load_config(typing.get_type_hints(QuickstartConfig)[file.stem], [file])
        return
    commands = [c for c, stem in STEM_OF_COMMAND.items() if file.stem == stem or file.stem.startswith(f"{stem}_")]
    assert commands, f"{file} is named like no command"
    load_config(config_class(commands[0]), [file])


def test_no_folder_of_configurations_is_empty() -> None:
    folders = [f for f in CONFIGS.iterdir() if f.is_dir()]
    assert folders
    assert all(list(folder.glob("*.yaml")) for folder in folders)


def test_every_verb_has_a_configuration_and_a_run() -> None:
    for command, (module, _, _) in COMMANDS.items():
        assert callable(importlib.import_module(module).run)
        assert dataclasses.is_dataclass(config_class(command))


def sources() -> Iterator[str]:
    for package in (ardiff, ray_jobs):
        for file in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
            yield file.read_text()


class Reads(ast.NodeVisitor):
    """Attribute names that are read, each with the class around it that checks its own fields, if any."""

    def __init__(self) -> None:
        self.found: set[tuple[str, str]] = set()
        self.classes: list[str] = []
        self.checks = 0

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.classes.append(node.name)
        self.generic_visit(node)
        self.classes.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.checks += node.name == "__post_init__"
        self.generic_visit(node)
        self.checks -= node.name == "__post_init__"

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load) and not (self.checks and ast.unparse(node.value) == "self"):
            self.found.add((node.attr, self.classes[-1] if self.classes else ""))
        self.generic_visit(node)


@pytest.fixture(scope="module")
def reads() -> dict[str, set[str]]:
    """For each attribute name, the classes (or "" for none) in which it is read."""
    found: dict[str, set[str]] = {}
    for text in sources():
        visitor = Reads()
        visitor.visit(ast.parse(text))
        for name, where in visitor.found:
            found.setdefault(name, set()).add(where)
    return found


def properties(cls: type[Any]) -> dict[str, str]:
    """The names of a class's properties and methods, with the fields that they read."""
    tree = ast.parse(Path(str(importlib.import_module(cls.__module__).__file__)).read_text())
    (node,) = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == cls.__name__]
    members = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name != "__post_init__"]
    return {m.name: ast.unparse(m) for m in members}


@pytest.mark.parametrize("cls", ALL_CLASSES, ids=lambda c: c.__qualname__)
def test_every_setting_is_read(cls: type[Any], reads: dict[str, set[str]]) -> None:
    """A setting that no code reads is a lie. Checks of the class on its own fields do not count as reading; a property
    counts if it is read itself."""
    for field in dataclasses.fields(cls):
        outside = reads.get(field.name, set()) - {cls.__name__}
        through = [n for n, text in properties(cls).items() if f"self.{field.name}" in text and reads.get(n, set())]
        assert outside or through, f"{cls.__name__}.{field.name} is read nowhere"


@pytest.mark.parametrize("cls", ALL_CLASSES, ids=lambda c: c.__qualname__)
def test_every_setting_is_documented_typed_and_frozen(cls: type[Any]) -> None:
    documentation = field_documentation(cls)
    assert all(documentation[f.name] for f in dataclasses.fields(cls))
    assert cls.__dataclass_params__.frozen
    assert all(f.kw_only for f in dataclasses.fields(cls))
    assert "__slots__" in vars(cls)


def test_configurations_are_never_asked_with_a_default_beside_the_class() -> None:
    for text in sources():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) == 3:
                assert "config" not in ast.unparse(node.args[0]).lower()


def test_the_scan_sees_every_configuration_class() -> None:
    """Configuration classes that no command reaches would escape the test above."""
    found = set()
    for package in (ardiff, ray_jobs):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if info.name.endswith("deepspeed_engine"):
                continue
            for name, value in vars(importlib.import_module(info.name)).items():
                if name.endswith("Config") and dataclasses.is_dataclass(value) and value.__module__ == info.name:
                    found.add(value)
    assert found <= set(ALL_CLASSES), found - set(ALL_CLASSES)
