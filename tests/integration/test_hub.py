"""A pipeline on a hub: uploaded, downloaded and found in the cache, with the hub's HTTP on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, HubServer

SCRIPT = """
import json, os, sys
from pathlib import Path
from urllib.request import urlopen
import torch
from ardiff.errors import CheckpointError
from ardiff.model_card import ModelCard
from ardiff.pipeline import ARDiffusionPipeline

result = {}

def load(*arguments, **options):
    before = requests()
    try:
        return ARDiffusionPipeline.from_pretrained(*arguments, **options)
    except CheckpointError as error:
        return str(error)
    finally:
        counts.append(requests() - before)

def requests():
    return json.load(urlopen(os.environ["HF_ENDPOINT"] + "/_requests"))

def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.dit.parameters(), second.dit.parameters(), strict=True))

counts = []
pipeline = ARDiffusionPipeline.from_pretrained(sys.argv[1])
try:
    pipeline.push_to_hub("lab/tiny")
except CheckpointError as error:
    result["no token"] = str(error)
os.environ["HF_TOKEN"] = sys.argv[2]
commit = pipeline.push_to_hub("lab/tiny", ModelCard(license="apache-2.0"))
result["commit"] = commit
result["not asked"] = load("lab/tiny")
result["downloaded"] = same(load("lab/tiny", local_files_only=False), pipeline)
result["cached"] = same(load("lab/tiny"), pipeline)
result["cached commit"] = same(load("lab/tiny", revision=commit), pipeline)
result["cache first"] = same(load("lab/tiny", local_files_only=False), pipeline)
result["no repository"] = load("lab/none", local_files_only=False)
result["no revision"] = load("lab/tiny", revision="none", local_files_only=False)
with torch.no_grad():
    next(pipeline.dit.parameters()).zero_()
pipeline.push_to_hub("lab/tiny", revision="draft")
result["draft"] = same(load("lab/tiny", revision="draft", local_files_only=False), pipeline)
result["main is not the draft"] = not same(load("lab/tiny"), pipeline)
pipeline.save_pretrained("lab/tiny")
result["folder first"] = same(load("lab/tiny", local_files_only=False), pipeline)
print(json.dumps({**result, "counts": counts}))
"""


@pytest.fixture(scope="module")
def result(make_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("hub")
    make_pipeline().save_pretrained(str(folder / "pipeline"))
    others = {"pytorch_model.bin": b"a pickle", "../outside.txt": b"a way out"}
    with HubServer(others) as server:
        settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
        env = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"} | settings
        command = [sys.executable, "-c", SCRIPT, str(folder / "pipeline"), TOKEN]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        values = json.loads(done.stdout.splitlines()[-1])
        return {**values, "server": server, "folder": folder}


def test_a_pipeline_goes_to_the_hub_and_back(result: dict[str, Any]) -> None:
    assert result["downloaded"]
    assert result["draft"]
    assert result["main is not the draft"]
    server, commit = result["server"], result["commit"]
    files = server.repos["lab/tiny"][commit]
    assert {"README.md", "config.json", "dit.safetensors", "vae.safetensors"} <= files.keys()
    assert files["README.md"].startswith(b"---\nlicense: apache-2.0\n")
    assert b'from_pretrained("lab/tiny"' in files["README.md"]
    assert server.heads["lab/tiny", "draft"] != server.heads["lab/tiny", "main"] == commit


def test_the_network_is_used_only_when_asked_and_needed(result: dict[str, Any]) -> None:
    names = ["not asked", "downloaded", "cached", "cached commit", "cache first", "none", "no revision", "draft"]
    counts = dict(zip([*names, "main", "folder"], result["counts"], strict=True))
    assert {name for name, count in counts.items() if count} == {"downloaded", "none", "no revision", "draft"}
    assert result["cached"]
    assert result["cached commit"]
    assert result["cache first"]
    assert result["folder first"]


def test_only_the_files_of_a_pipeline_are_downloaded(result: dict[str, Any]) -> None:
    home = result["folder"] / "home"
    snapshots = [path for path in home.rglob("*") if "snapshots" in path.parts and path.is_file()]
    assert {path.name for path in snapshots} == {"README.md", "config.json", "dit.safetensors", "vae.safetensors"}
    assert not list(Path(result["folder"]).rglob("outside.txt"))
    assert not [request for request in result["server"].requests if "pytorch_model" in request]


def test_errors_say_what_to_do(result: dict[str, Any]) -> None:
    assert "cannot be uploaded to lab/tiny: " in result["no token"]
    assert "401" in result["no token"]
    assert "download it with local_files_only=False" in result["not asked"]
    assert result["no repository"].startswith("lab/none cannot be downloaded: ")
    assert "404" in result["no repository"]
    assert "none" in result["no revision"]
