"""Which code may know which: read from the source, then seen in a fresh process."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE_FOLDERS = {"fasttht": "fasttht", "pipelines": "fasttht.pipelines", "kernels": "fasttht.kernels"}
MAX_LINES = 350
# What users may not have: imported inside the function that needs it, never by importing a module of ours.
EXTRAS = ["ffcv", "numba", "nvidia", "cuda", "apex", "matplotlib", "tensorboard", "onnx", "pyautoattack", "faiss"]
# Slow to import as well: a command line that only parses its arguments needs none of these.
HEAVY = ["torch", "torchvision", "cv2", "sklearn", "scipy", *EXTRAS]
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def _files(*folders: str, suffixes: tuple[str, ...] = (".py",)) -> list[Path]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return sorted(path for path in found if path.suffix in suffixes)


def _package_of(path: Path) -> str:
    """The package that a relative import in this file starts from."""
    folder, *rest = path.relative_to(ROOT).parent.parts
    return ".".join([PACKAGE_FOLDERS.get(folder, folder), *rest])


def _imports(source: str, package: str = "") -> Iterator[str]:
    """Every dotted name that the source imports, "from a import b" as a.b, relative ones made absolute."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, node.module] if node.module else above)
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            constants = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            yield from (value for value in constants if isinstance(value, str))


def _inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def _foreign_to_kernels(source: str, package: str) -> list[str]:
    allowed = ("fasttht.kernels", "torch", "cuda", *sys.stdlib_module_names)
    return [name for name in _imports(source, package) if not _inside(name, *allowed)]


def _foreign_to_pipelines(source: str, package: str) -> list[str]:
    ours = [name for name in _imports(source, package) if _inside(name, "fasttht")]
    return [name for name in ours if not _inside(name, "fasttht.pipelines")]


def _bare_names(source: str, package: str) -> list[str]:
    return [name for name in _imports(source, package) if _inside(name, "kernels", "pipelines")]


def _unsafe(source: str, package: str) -> list[str]:
    """Ways to run code that came in with data: pickles in any wrapping, and eval."""
    found = [name for name in _imports(source, package) if _inside(name, *UNSAFE_MODULES)]
    found += [name for name in _imports(source, package) if name in ("torch.load", "torch.save")]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if call in ("eval", "exec", "torch.save"):
            found.append(call)
        elif call == "torch.load" and given.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        elif given.get("allow_pickle", "False") != "False":
            found.append(f"{call} with allow_pickle")
    return found


RULES = [
    pytest.param(_foreign_to_kernels, ("kernels",), id="kernels knows only torch"),
    pytest.param(_foreign_to_pipelines, ("pipelines",), id="pipelines knows nothing of ours"),
    pytest.param(_bare_names, (*PACKAGE_FOLDERS, "tests", "tools", "examples"), id="no bare folder name"),
    pytest.param(_unsafe, (*PACKAGE_FOLDERS, "tools", "examples"), id="nothing is pickled"),
]


@pytest.mark.parametrize(("rule", "folders"), RULES)
def test_source_keeps_the_rule(rule: Callable[[str, str], list[str]], folders: tuple[str, ...]) -> None:
    broken = {
        str(path.relative_to(ROOT)): found
        for path in _files(*folders)
        if (found := rule(path.read_text(encoding="utf-8"), _package_of(path)))
    }
    assert not broken


@pytest.mark.parametrize(
    ("rule", "package", "source"),
    [
        (_foreign_to_kernels, "fasttht.kernels", "import numpy as np"),
        (_foreign_to_kernels, "fasttht.kernels", "from fasttht.pipelines import plan"),
        (_foreign_to_kernels, "fasttht.kernels", "from .. import losses"),
        (_foreign_to_kernels, "fasttht.kernels", "def f():\n    import triton"),
        (_foreign_to_pipelines, "fasttht.pipelines", "import fasttht.kernels"),
        (_foreign_to_pipelines, "fasttht.pipelines", "from fasttht import config"),
        (_foreign_to_pipelines, "fasttht.pipelines", "from ..kernels.reference import draw_start"),
        (_foreign_to_pipelines, "fasttht.pipelines", "importlib.import_module('fasttht.train')"),
        (_bare_names, "tests", "import kernels"),
        (_bare_names, "tools", "from pipelines.beton import read"),
        (_unsafe, "fasttht", "import pickle"),
        (_unsafe, "fasttht", "from joblib import dump"),
        (_unsafe, "fasttht", "torch.load(path)"),
        (_unsafe, "fasttht", "torch.load(path, weights_only=False)"),
        (_unsafe, "fasttht", "from torch import load"),
        (_unsafe, "fasttht", "np.load(path, allow_pickle=True)"),
        (_unsafe, "fasttht", "eval('16/255')"),
    ],
)
def test_rule_catches_a_breach(rule: Callable[[str, str], list[str]], package: str, source: str) -> None:
    assert rule(source, package)


@pytest.mark.parametrize(
    ("rule", "package", "source"),
    [
        (_foreign_to_kernels, "fasttht.kernels", "import ctypes; from . import reference"),
        (_foreign_to_kernels, "fasttht.kernels", "from cuda.core import Device"),
        (_foreign_to_pipelines, "fasttht.pipelines", "import torch\nfrom .plan import EpochPlan"),
        (_bare_names, "tests", "from fasttht.kernels import reference"),
        (_unsafe, "fasttht", "model.eval(); torch.load(path, weights_only=True)"),
        (_unsafe, "fasttht", "np.load(path, allow_pickle=False)"),
    ],
)
def test_rule_lets_the_allowed_pass(rule: Callable[[str, str], list[str]], package: str, source: str) -> None:
    assert rule(source, package) == []


def test_no_module_is_called_utils() -> None:
    """A name that says nothing collects everything."""
    files = _files(*PACKAGE_FOLDERS, "tools", "examples")
    assert [path for path in files if path.stem in ("utils", "util", "helpers", "misc", "common")] == []


def test_no_file_does_two_jobs() -> None:
    files = _files(*PACKAGE_FOLDERS, "tools", suffixes=(".py", ".sh", ".cu", ".cuh"))
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert [f"{path}: {length}" for path, length in lengths.items() if length > MAX_LINES] == []


def _python(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["fasttht", "fasttht.cli", "fasttht.config"])
def test_importing_the_command_line_loads_nothing_heavy(module: str, tmp_path: Path) -> None:
    """So that --help and a wrong flag answer at once, on a machine without a GPU or with a broken torch."""
    # What is loaded before the first line, by a package's .pth file, is none of ours.
    code = f"import sys; bare = set(sys.modules); import {module}; print(*set({HEAVY}) & (set(sys.modules) - bare))"
    assert _python(code, tmp_path) == ""


def test_importing_every_module_touches_neither_gpu_nor_extras(tmp_path: Path) -> None:
    code = f"""
import importlib, pkgutil, sys
import torch

def refuse(*args, **kwargs):
    raise AssertionError("a GPU was asked for at import")

for name in ("is_available", "device_count", "current_device", "get_device_capability", "_lazy_init"):
    setattr(torch.cuda, name, refuse)
loaded_by_torch = [name for name in {EXTRAS} if name in sys.modules]

imported = set()
for root in ("fasttht", "fasttht.pipelines", "fasttht.kernels"):
    package = importlib.import_module(root)
    for module in pkgutil.walk_packages(package.__path__, root + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
            imported.add(module.name)
assert {{"fasttht.losses", "fasttht.pipelines.plan", "fasttht.kernels.reference"}} <= imported, imported
print(*[name for name in {EXTRAS} if name in sys.modules and name not in loaded_by_torch])
"""
    assert _python(code, tmp_path) == ""
