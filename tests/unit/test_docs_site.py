"""The site of docs/: it builds strictly, shows docstrings, and loads nothing from other hosts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return folder


def test_every_page_is_in_the_site(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix("") for path in ROOT.glob("docs/**/*.md")}
    built = {path.parent.relative_to(site) for path in site.rglob("index.html")}
    assert {page for page in pages if page.name != "index"} == built - {Path()}
    navigation = (site / "index.html").read_text()
    assert [str(page) for page in pages if page.name != "index" and f'href="{page}/"' not in navigation] == []
    assert not list(site.rglob("*.py"))


def test_docstrings_are_shown_without_markup(site: Path) -> None:
    page = (site / "api" / "pipeline" / "index.html").read_text()
    assert 'id="ardiff.pipeline.ARDiffusionPipeline.from_pretrained"' in page
    assert "A local folder of that name" in page
    texts = [path.read_text() for path in site.glob("api/*/index.html")]
    assert [re.findall(":(?:class|func|meth|mod|data):", text) for text in texts] == [[]] * len(texts)
    assert '<pre><code>pipeline = ARDiffusionPipeline.from_pretrained("runs/quickstart/pipeline")' in page
    assert not any("<blockquote>" in text for text in texts)


def test_pages_load_nothing_from_other_hosts(site: Path) -> None:
    for path in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="?(https?:[^" >]+)', path.read_text())
        assert loaded == [], path
