"""A sampling parameter is declared once, in SamplingParams; every layer reads the fields of that class."""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from ardiff.sampling.params import SamplingParams

ROOT = Path(__file__).parents[3]
COMMON_WORDS = {"num_frames", "seed", "given_frames", "size"}
"""Names with other meanings too: length of a clip, seed of a training run or a shuffle, pixels and bytes."""
ALLOWED = {
    "ardiff/sampling/params.py": "the declaration",
    "ardiff/sampling/modulations.py": "a table of modulations has one row per sampling step",
    "ardiff/diffusion/ad.py": "equations take their variables one by one",
    "ardiff/diffusion/ar_step.py": "equations take their variables one by one",
    "ardiff/diffusion/sampler.py": "equations take their variables one by one",
    "ardiff/diffusion/solvers.py": "equations take their variables one by one",
    "ardiff/diffusion/guidance.py": "equations take their variables one by one",
    "ardiff/diffusion/sampling_defaults.py": "what a model stores for requests that leave these two out",
    "ardiff/serving/config.py": "upper limits of an endpoint",
    "ardiff/serving/schemas.py": "the HTTP API also accepts a class by its name",
    "ardiff/serving/records.py": "the prompt of the request, which may be the name of a class",
    "ray_jobs/reports/ablation.py": "a result of an ablation is identified by its ar_step",
}
NEW_FIELD = '''
    sharpness: float = field(default=0.5, metadata={"tag": "sh"})
    """How sharp."""
'''
CHECK_NEW_FIELD = """
from ardiff.cli import read_arguments
from ardiff.config import build
from ardiff.sampling.params import ModelInfo, SamplingParams, expand_params
from ardiff.serving.schemas import Video, VideoRequest
from ardiff.sweep.grid import GridConfig, sweep_points
from ardiff.sweep.manifest import SCHEMA
from ardiff.sweep.models import SweptModel
from ardiff.sweep.specs import spec_id

[params] = expand_params(sharpness=0.7)  # as in a call of the pipeline
assert params.sharpness == 0.7
assert read_arguments("generate", ["--sharpness", "0.7"]).config.params == params
assert read_arguments("generate", ["sharpness=0.7"]).config.params == params
model = SweptModel("m", "f00d", ModelInfo(num_frames=16, num_classes=0, num_timesteps=1000))
grid = build(GridConfig, {"axes": {"sharpness": [0.5, 0.7]}})
assert [point.name for point in sweep_points(grid, [model], "fp32")] == ["ar5-f00d", "ar5-sh0.7-f00d"]
assert SCHEMA.field("sharpness").type == "double"
assert VideoRequest(sharpness=0.7).sharpness == 0.7
assert VideoRequest.model_fields["sharpness"].description == "How sharp."
assert "sharpness" in Video.model_fields
print(spec_id("f00d", SamplingParams(num_frames=8), "fp32"))
"""


def declarations(file: Path, names: set[str]) -> Iterator[str]:
    """Classes with annotated fields, and functions with parameters, that are called like sampling parameters."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ClassDef):
            targets = [statement.target for statement in node.body if isinstance(statement, ast.AnnAssign)]
            declared = {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            declared = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
        else:
            continue
        if repeated := declared & names:
            yield f"{file.relative_to(ROOT)}: {node.name} declares {', '.join(sorted(repeated))}"


def test_no_layer_declares_a_sampling_parameter_again() -> None:
    names = {f.name for f in fields(SamplingParams)} - COMMON_WORDS
    files = [file for package in ("ardiff", "ray_jobs") for file in sorted((ROOT / package).rglob("*.py"))]
    found = {str(f.relative_to(ROOT)): list(declarations(f, names)) for f in files}
    repeated = [line for file, lines in found.items() if file not in ALLOWED for line in lines]
    assert not repeated, "\n".join(repeated)
    assert all(found[file] for file in ALLOWED), "take the file out of ALLOWED"


def test_a_new_parameter_reaches_every_layer(tmp_path: Path) -> None:
    """In a copy of the tree: pipeline call, option of `generate`, sweep axis, manifest column and API field."""
    for package in ("ardiff", "ray_jobs"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "ardiff" / "sampling" / "params.py"
    declaration, marker, methods = file.read_text().partition("\n    def shared(self)")
    assert marker
    file.write_text(declaration + NEW_FIELD + marker + methods)
    command = [sys.executable, "-c", CHECK_NEW_FIELD]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    from ardiff.sweep.specs import spec_id

    assert result.stdout.split()[-1] == spec_id("f00d", SamplingParams(num_frames=8), "fp32")
