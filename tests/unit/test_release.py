"""docs/release.md against the packages that are installed, and what the wheel and the sdist hold."""

import importlib.util
import re
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "release.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_table_has_every_direct_dependency_with_its_extras() -> None:
    project = PROJECT["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    extras: dict[str, set[str]] = {}
    for group, requirements in groups.items():
        for requirement in requirements:
            name = re.split(r"[^\w.-]", requirement)[0]
            if name != "ardiff" and group not in ("all", "dev"):
                extras.setdefault(name, set()).add(group)
    table = re.findall(r"^\| ([a-z0-9-]+) \| ([a-z, ]*) ?\| .+ \|$", PAGE.partition("Copyleft, direct")[0], re.M)
    assert {name: set(cell.strip().split(", ")) for name, cell in table[1:]} == extras  # the first row is the head


def test_every_copyleft_package_is_on_the_page() -> None:
    spec = importlib.util.spec_from_file_location("licenses", ROOT / ".ci" / "licenses.py")
    assert spec is not None
    assert spec.loader is not None
    licenses = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(licenses)
    copyleft = {
        package.metadata["Name"].lower()
        for package in metadata.distributions()
        if re.search("GPL|GNU|MPL|Mozilla", licenses.license_of(package))
    }
    assert "certifi" in copyleft
    assert {name for name in copyleft if name not in PAGE} == set()


def test_every_folder_of_configurations_is_in_the_wheel() -> None:
    files = PROJECT["tool"]["setuptools"]["data-files"]
    folders = {path.parent.relative_to(ROOT) for path in ROOT.glob("configs/**/*.yaml")}
    assert files == {f"share/ardiff/{folder}": [f"{folder}/*.yaml"] for folder in map(str, folders)}
