"""What the pages name, against the code: commands, options, settings, modules and files."""

import contextlib
import dataclasses
import functools
import importlib
import io
import re
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ardiff.cli import COMMANDS, TOOLS, main, read_arguments
from ardiff.config import build, section_classes
from ardiff.data.config import StorageConfig
from ardiff.errors import ConfigError
from ray_jobs.serve import ReplicaConfig
from ray_jobs.submit import submit_parser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "cluster" / "README.md"]
BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
FLAG = re.compile(r"(?<!\S)--[a-z][a-z-]*")
SETTING = re.compile(r"([a-z]\w*(?:\.[a-z]\w*)*)=(.*)")
NAME = re.compile(r"[a-z]\w*(?:\.[a-z]\w*)+")
PLACE = re.compile(r"(?:ardiff|ray_jobs|cluster|configs|docs|tests|benchmarks)/[\w./*-]*")
FILES = (
    ".toml",
    ".yaml",
    ".yml",
    ".json",
    ".md",
    ".png",
    ".html",
    ".parquet",
    ".py",
    ".txt",
    ".jsonl",
    ".csv",
    ".mp4",
    ".sqlite",
)
FOREIGN = {"--help", "--local-dir", "--name"}
"""Options of every command, of `hf` and of `eksctl`."""
CONFIGS = {name: getattr(importlib.import_module(module), name) for name, (module, name, _) in COMMANDS.items()}


def settings(cls: type[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of a configuration class and of its sections: its name in dots, and its type."""
    for name, hint in typing.get_type_hints(cls).items():
        yield prefix + name, hint
        for section in section_classes(hint):
            yield from settings(section, f"{prefix}{name}.")


SETTINGS = [
    *(setting for cls in [*CONFIGS.values(), ReplicaConfig] for setting in settings(cls)),
    *settings(StorageConfig, "storage."),
]


def types_of(name: str) -> list[Any]:
    """The types of all settings that a page may mean: it may leave out the sections around one."""
    return [hint for full, hint in SETTINGS if full == name or full.endswith(f".{name}")]


def takes(hint: Any, value: str) -> bool:
    """Whether a setting of the type can be the value; a word with capitals and ... stand for one."""
    if value in ("", "...") or re.search("[A-Z]", value):
        return True
    try:
        build(dataclasses.make_dataclass("Holder", [("value", hint)]), {"value": yaml.safe_load(value)})
    except (ConfigError, yaml.YAMLError):
        return False
    return True


@functools.cache
def options(*command: str) -> set[str]:
    """The options that the help of a command lists."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return set(re.findall(r"--[a-z][a-z-]*", said.getvalue()))


def options_of_benchmarks(*names: str) -> set[str]:
    """The options that the sources in benchmarks/ name."""
    return {flag for name in names for flag in re.findall(r'"(--[a-z][a-z-]*)"', (ROOT / name).read_text())}


def known_options(span: str) -> set[str]:
    """The options that may stand in a span of code: of the command that it is of, or else of any."""
    if benchmark := re.search(r"benchmarks/\w+\.py", span):
        return options_of_benchmarks(benchmark[0])
    if (command := re.match(r"ardiff ([a-z-]+)", span)) and command[1] in COMMANDS:
        return options(command[1])
    benchmarks = options_of_benchmarks(*(str(file.relative_to(ROOT)) for file in ROOT.glob("benchmarks/*.py")))
    return benchmarks.union(options(), options("client", "create"), *(options(name) for name in (*COMMANDS, *TOOLS)))


def exists(name: str) -> bool:
    """Whether there is such a module, or such a thing in one."""
    module, _, thing = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ImportError:
        return bool(module) and hasattr(importlib.import_module(module), thing)
    return True


def wrong(span: str) -> Iterator[str]:
    """What a span of code in the prose names and the code has not."""
    for flag in FLAG.findall(span):
        if flag not in known_options(span) | FOREIGN:
            yield f"no option {flag}: {span}"
    for word in span.split():
        if (found := SETTING.fullmatch(word)) and word != "key=value":
            hints = types_of(found[1])
            if not any(takes(hint, found[2].strip('"')) for hint in hints):
                yield f"{'no such value' if hints else 'no setting'} {word}: {span}"
    if NAME.fullmatch(span) and not span.endswith(FILES) and not types_of(span) and not exists(span):
        yield f"neither setting nor module {span}"
    if PLACE.fullmatch(span) and not list(ROOT.glob(span)):
        yield f"no file {span}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_the_prose_names_exists(page: Path) -> None:
    prose = BLOCK.sub("", page.read_text())
    spans = [" ".join(span.split()) for span in re.findall("`([^`]+)`", prose)]
    assert [complaint for span in spans for complaint in wrong(span)] == []
    links = [link.partition("#")[0] for link in re.findall(r"\]\((?!http)([^)]+)\)", prose)]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize(
    ("span", "complaint"),
    [
        ("ardiff train-dit --resume latest", None),
        ("ardiff train-dit --resum latest", "no option --resum"),
        ("ardiff train-dit --num-videos 3", "no option --num-videos"),
        ("--no-such", "no option --no-such"),
        ("train.engine=deepspeed", None),
        ("train.engine=deepsped", "no such value train.engine=deepsped"),
        ("train.num_stepps=3", "no setting train.num_stepps=3"),
        ("train.num_steps=N", None),
        ("train.no_such", "neither setting nor module"),
        ("ardiff.dit", None),
        ("ardiff.no_such", "neither setting nor module"),
        ("ardiff/no_such.py", "no file"),
    ],
)
def test_what_is_gone_is_found(span: str, complaint: str | None) -> None:
    found = list(wrong(span))
    assert len(found) == (complaint is not None)
    assert complaint is None or found[0].startswith(complaint)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_in_blocks_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = [line for block in BLOCK.findall(page.read_text()) for line in block.replace("\\\n", " ").splitlines()]
    for line in lines:
        words = shlex.split(line, comments=True) if re.match(r"(\$ )?ardiff ", line) else []
        if not words:
            continue
        name, arguments = words[words.index("ardiff") + 1], words[words.index("ardiff") + 2 :]
        if name == "submit":
            sent = submit_parser().parse_args(arguments)
            name, arguments = sent.job, sent.arguments
        if name in COMMANDS:
            read_arguments(name, arguments)
        else:
            command = [name, arguments[0]] if name == "client" else [name]
            assert {word for word in arguments if word.startswith("--")} <= options(*command), line
