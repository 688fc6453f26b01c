"""What each installation can do: the bare package generates videos, and a command without its extra names the extra."""

import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Callable
from pathlib import Path

import av
import pytest

from ardiff.pipeline import ARDiffusionPipeline

ROOT = Path(__file__).parents[2]
BLOCK_EXTRAS = """
import sys

BLOCKED = (
    "aiohttp deepspeed fastapi httpx huggingface_hub jinja2 matplotlib pandas prometheus_client pydantic ray requests"
    " rich scipy starlette tensorboard tokenizers transformers"
).split()

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""
"""Makes a process see only what `pip install ardiff` installs."""
IMPORT_EVERYTHING = """
import importlib, pkgutil
import ardiff

for module in pkgutil.walk_packages(ardiff.__path__, "ardiff."):
    if not module.name.startswith(("ardiff.serving", "ardiff.client", "ardiff.train.engines.deepspeed_engine")):
        importlib.import_module(module.name)
"""
GENERATE = """
import sys
from pathlib import Path
from ardiff.pipeline import ARDiffusionPipeline

pipeline = ARDiffusionPipeline.from_pretrained(sys.argv[1])
video = pipeline(class_label=1, num_frames=8, ar_step=2, num_inference_steps=4, seed=3, output_type="mp4")
Path(sys.argv[2]).write_bytes(video.frames[0])
"""
RUN_COMMANDS = """
from ardiff.cli import TOOLS, COMMANDS, main

for command in [*COMMANDS, *TOOLS]:
    try:
        code = main([command, "--help"])
    except SystemExit as error:
        code = error.code
    print("exit", command, code)
"""
BARE_COMMANDS = {"export", "import-upstream", "compare", "weights", "api-key", "estimate", "gpu-check"}
SERVE_COMMANDS = {"serve", "lint-serve", "client"}


def run(*command: str | Path, **options: str | Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    return done  # type: ignore[no-any-return]


def count_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_the_method_needs_no_extra(make_pipeline: Callable[..., ARDiffusionPipeline], tmp_path: Path) -> None:
    make_pipeline().save_pretrained(str(tmp_path / "pipeline"))
    script = BLOCK_EXTRAS + IMPORT_EVERYTHING + GENERATE
    run(sys.executable, "-c", script, tmp_path / "pipeline", tmp_path / "video.mp4", cwd=ROOT)
    assert count_frames(tmp_path / "video.mp4") == 8


def test_a_command_without_its_extra_says_what_to_install() -> None:
    done = run(sys.executable, "-c", BLOCK_EXTRAS + RUN_COMMANDS, cwd=ROOT)
    exits = dict(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("exit "))
    assert {command for command, code in exits.items() if code == "0"} == BARE_COMMANDS
    missing = exits.keys() - BARE_COMMANDS
    messages = done.stderr.splitlines()
    assert len(messages) == len(missing)
    assert all(message.startswith("ardiff: This command needs the package ") for message in messages)
    assert sum("pip install 'ardiff[serve]'" in message for message in messages) == len(SERVE_COMMANDS)
    assert sum("pip install 'ardiff[ray]'" in message for message in messages) == len(missing - SERVE_COMMANDS)


@pytest.mark.slow
def test_the_wheel_of_the_sdist_generates_in_an_empty_environment(
    make_pipeline: Callable[..., ARDiffusionPipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)  # it would show pip and Python this checkout
    source, environment = tmp_path / "source", tmp_path / "environment"
    for name in run("git", "ls-files", cwd=ROOT).stdout.splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    # The wheel is built from the unpacked sdist, so the sdist is complete.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", source)
    [wheel] = (tmp_path / "dist").glob("ardiff-*.whl")
    [sdist] = (tmp_path / "dist").glob("ardiff-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CHANGELOG.md", "docs/index.md", "examples/play_videos.ipynb", "tests/conftest.py"} <= names
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "install", "--quiet", "--constraint", source / "constraints.txt", wheel)
    installed = {line.partition("==")[0].lower() for line in run(*pip, "freeze").stdout.splitlines()}
    assert "torch" in installed
    assert not installed & {
        "ray",
        "deepspeed",
        "fastapi",
        "pydantic",
        "matplotlib",
        "pandas",
        "rich",
        "scipy",
        "transformers",
    }
    make_pipeline().save_pretrained(str(tmp_path / "pipeline"))
    run(python, "-c", GENERATE, tmp_path / "pipeline", tmp_path / "video.mp4", cwd=tmp_path)
    assert count_frames(tmp_path / "video.mp4") == 8
    help_text = run(environment / "bin" / "ardiff", "estimate", "--help", cwd=tmp_path).stdout
    assert "usage: ardiff estimate" in help_text
    find = "from ardiff.config import find_config; print(find_config('quickstart/train_dit.yaml').read_text())"
    assert run(python, "-c", find, cwd=tmp_path).stdout.strip() == (
        (ROOT / "configs" / "quickstart" / "train_dit.yaml").read_text().strip()
    )
    failed = subprocess.run(
        [environment / "bin" / "ardiff", "quickstart"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.splitlines() == [failed.stderr.strip()]
    assert "pip install 'ardiff[ray]'" in failed.stderr
