"""The wall between the method and the cluster: ``ardiff`` loads neither Ray nor DeepSpeed."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ALONE = {"deepspeed_engine"}  # the one module that may import deepspeed
SCRIPT = """
import importlib, pkgutil, sys
import torch
before = torch.get_rng_state()
import ardiff
names = [m.name for m in pkgutil.walk_packages(ardiff.__path__, "ardiff.") if m.name.rpartition(".")[2] not in ALONE]
for name in names:
    importlib.import_module(name)
assert torch.equal(torch.get_rng_state(), before), "importing ardiff draws random numbers"
loaded = {m.partition(".")[0] for m in sys.modules}
print(len(names), sorted(loaded & {"ray", "deepspeed", "ray_jobs"}))
"""


def test_importing_every_module_of_ardiff_loads_neither_ray_nor_deepspeed() -> None:
    script = f"ALONE = {ALONE!r}\n{SCRIPT}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count, loaded = done.stdout.split(maxsplit=1)
    assert int(count) > 30
    assert loaded.strip() == "[]"
    assert not done.stderr


def top_level_imports(tree: ast.Module) -> set[str]:
    """First parts of what a module imports when it is imported, in any block but a function's."""
    found: set[str] = set()
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                continue
            case ast.If() if "TYPE_CHECKING" in ast.unparse(node.test):
                waiting += node.orelse
                continue
            case ast.Import():
                found |= {alias.name.partition(".")[0] for alias in node.names}
            case ast.ImportFrom():
                found.add((node.module or "").partition(".")[0])
        waiting += list(ast.iter_child_nodes(node))
    return found


def test_no_file_of_ardiff_imports_the_cluster_at_top_level() -> None:
    files = sorted((ROOT / "ardiff").rglob("*.py"))
    assert len(files) > 30
    for file in files:
        imports = top_level_imports(ast.parse(file.read_text()))
        forbidden = {"ray", "ray_jobs"} | (set() if file.stem in ALONE else {"deepspeed"})
        assert not imports & forbidden, file


def test_no_mathematics_in_the_cluster() -> None:
    """ray_jobs wires functions of ardiff together: it defines no module with weights and no loss."""
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
