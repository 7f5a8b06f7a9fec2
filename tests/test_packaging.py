"""The wheel: everything that belongs in it, nothing else, and what is in it passes mypy --strict."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# Folder in the repository -> the name people import. Three folders, one package.
ROOTS = {"fasttht": "fasttht", "pipelines": "fasttht.pipelines", "kernels": "fasttht.kernels"}


def _setuptools_table() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        table: dict[str, Any] = tomllib.load(file)["tool"]["setuptools"]
    return table


def _source_files() -> dict[str, Path]:
    """Path inside the wheel -> path in the repository, for every file that the wheel should carry."""
    files = {}
    for folder, package in ROOTS.items():
        for path in sorted((ROOT / folder).rglob("*")):
            inside = path.relative_to(ROOT / folder)
            hidden = any(part.startswith(".") or part == "__pycache__" for part in inside.parts)
            if path.is_file() and not hidden and path.suffix != ".pyc":
                files[f"{package.replace('.', '/')}/{inside.as_posix()}"] = path
    return files


def _run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    # Neither of these two may decide what a child process can import.
    hidden = ("PYTHONPATH", "PYTHONSAFEPATH")
    env = {name: value for name, value in os.environ.items() if name not in hidden} | env
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A copy, because building leaves build/ and *.egg-info in the folder it builds from.
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in ROOTS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    built = _run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", source / "dist", source),
        cwd=source,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    done = _run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel),
        cwd=target,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def test_every_folder_of_python_files_is_a_listed_package() -> None:
    """The list in pyproject is explicit, so it can drift from the folders."""
    folders = {Path(inside).parent for inside in _source_files() if inside.endswith(".py")}
    found = [folder.as_posix().replace("/", ".") for folder in folders]
    assert sorted(_setuptools_table()["packages"]) == sorted(found)


def test_package_dir_maps_the_three_folders() -> None:
    mapping = {package: folder for folder, package in ROOTS.items()}
    assert _setuptools_table()["package-dir"] == mapping


def test_package_data_covers_every_file_that_is_not_python() -> None:
    data = _setuptools_table()["package-data"]
    patterns = [f"{name.replace('.', '/')}/{pattern}" for name in data for pattern in data[name]]
    # Named, so that a pattern is there before the first file that needs it.
    needed = ["fasttht/py.typed", "fasttht/presets/any.toml", "fasttht/pipelines/any.npz"]
    needed += ["fasttht/kernels/src/any.cu", "fasttht/kernels/src/any.cuh"]
    needed += [inside for inside in _source_files() if not inside.endswith(".py")]
    assert [file for file in needed if not any(fnmatch.fnmatch(file, pattern) for pattern in patterns)] == []


def test_the_wheel_holds_exactly_the_three_folders(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
        info = [name for name in archive.namelist() if ".dist-info/" in name]
    expected = _source_files()
    assert sorted(packed) == sorted(expected)
    assert [name for name, path in expected.items() if packed[name] != path.read_bytes()] == []
    assert [name for name in info if name.endswith("/LICENSE")]
    assert [name for name in info if name.endswith("/entry_points.txt")]


def test_the_wheel_passes_mypy_strict(installed: Path) -> None:
    """Run from a folder that holds the installed wheel alone, so that the checkout is not what is checked."""
    checked = _run(
        *(sys.executable, "-m", "mypy", "--strict", "-p", "fasttht"),
        *("--config-file", ROOT / "pyproject.toml", "--python-executable", sys.executable),
        *("--cache-dir", ROOT / ".mypy_cache" / "wheel"),  # its own: mypy run in the checkout sees other files
        cwd=installed,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    num_files = sum(1 for inside in _source_files() if inside.endswith(".py"))
    assert re.search(rf"no issues found in {num_files} source files", checked.stdout), checked.stdout


def test_the_installed_wheel_imports_from_anywhere(installed: Path, tmp_path: Path) -> None:
    code = "import fasttht.pipelines, fasttht.kernels; print(fasttht.kernels.__file__)"
    done = _run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(installed)


@pytest.mark.parametrize("folder", ["pipelines", "kernels"])
def test_a_folder_imported_under_its_bare_name_says_what_to_do(folder: str) -> None:
    """Imported twice, under two names, an op would be registered twice and the second would silently win."""
    done = _run(sys.executable, "-c", f"import {folder}", cwd=ROOT)
    assert done.returncode == 1
    assert f"ImportError: import this package as 'fasttht.{folder}', not '{folder}'" in done.stderr
    assert "pip install -e ." in done.stderr
