"""``ardiff`` is the method and ``ray_jobs`` the cluster. The contracts of `make lint` check the imports in the sources;
these tests check what an import loads, and rules that no import shows."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMPORT_ALL = """
import importlib, pkgutil, sys
import torch
before = torch.get_rng_state()
import ardiff
names = [m.name for m in pkgutil.walk_packages(ardiff.__path__, "ardiff.") if not m.name.endswith(".deepspeed_engine")]
for name in names:
    importlib.import_module(name)
assert torch.equal(torch.get_rng_state(), before), "importing ardiff draws random numbers"
loaded = {m.partition(".")[0] for m in sys.modules}
print(len(names), sorted(loaded & {"ray", "deepspeed", "ray_jobs"}))
"""


def test_importing_every_module_of_ardiff_loads_neither_ray_nor_deepspeed() -> None:
    command = [sys.executable, "-c", IMPORT_ALL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count, loaded = done.stdout.split(maxsplit=1)
    assert int(count) > 30
    assert loaded.strip() == "[]"
    assert not done.stderr


def test_no_mathematics_in_the_cluster() -> None:
    """``ray_jobs`` connects functions of ``ardiff``: it defines no module with weights and no loss."""
    for file in sorted((ROOT / "ray_jobs").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                assert not any("Module" in ast.unparse(base) for base in node.bases), f"{file}: {node.name}"


def test_the_method_prints_nothing_and_names_no_device() -> None:
    for file in sorted((ROOT / "ardiff" / "diffusion").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in {"print", "tqdm"}, file
            if isinstance(node, ast.Constant):
                assert node.value not in {"cpu", "cuda"}, file
