"""A machine with a GPU may have little beside torch and pytest: what tools/gpu_check.sh runs there starts without more.

Run here in processes that find no other package: tests are collected, and skipped for want of a GPU; benchmarks run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HIDDEN = ("cv2", "PIL", "scipy", "hypothesis", "sklearn", "skimage", "matplotlib", "torchvision", "numba", "ffcv")

# Put where Python looks for it before anything else runs: installed packages of these names are not there.
SITE = f"""
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in {HIDDEN}:
            path = [folder for folder in (sys.path if path is None else path) if "site-packages" not in folder]
        return PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""

# Files with tests that need a GPU and nothing that is hidden.
GPU_FILES = {
    *("attacks/test_graph.py", "attacks/test_pgd.py", "kernels/test_batch_norm.py", "kernels/test_convs.py"),
    *("kernels/test_gpu.py", "kernels/test_noise.py", "models/test_two_head.py", "pipelines/test_backends.py"),
    *("pipelines/test_decoders_agree.py", "test_augment.py", "test_bank.py", "test_dataset_bank.py", "test_draws.py"),
    *("test_losses.py", "test_moco.py", "test_step_engine.py"),
}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of such a machine."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(SITE)
    return {
        **os.environ, "PYTHONPATH": str(site), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def run(env: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False
    )


def test_every_gpu_test_is_collected(bare: dict[str, str]) -> None:
    done = run(bare, "pytest", "-v", "-p", "no:cacheprovider", "-m", "gpu", "tests")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    collected = {line.split("::")[0].removeprefix("tests/") for line in done.stdout.splitlines() if "::" in line}
    assert not GPU_FILES - collected


@pytest.mark.parametrize("words", [
    "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations",
    "Attempting to run cuBLAS, but there was no current CUDA context! Attempting to set the primary context...",
])  # fmt: skip
def test_what_torch_says_of_every_gpu_is_no_error(words: str) -> None:
    """Any of the tests there may be the first to hear it; here none does."""
    warnings.warn(words, UserWarning, stacklevel=1)


@pytest.mark.parametrize(
    "words",
    [
        ("kernels", "--ops", "drelu_add_", "--batch-size", "1", "--img-size", "16", "--window-s", "0.001"),
        ("attack", "--arch", "resnet18", "--stem", "small", "--batch-size", "2", "--engines", "eager", "fused"),
        ("step", "--arch", "resnet18", "--stem", "small", "--batch-size", "2", "--attack-engine", "folded"),
        ("zeros", "--arch", "resnet18", "--stem", "small", "--batch-size", "2", "--dtypes", "bf16", "--exponents", "0"),
    ],
    ids=lambda words: words[0],
)
def test_benchmarks_run(bare: dict[str, str], words: tuple[str, ...]) -> None:
    if words[0] != "kernels":
        words = (*words, "--width", "4", "--img-size", "8")
    if words[0] in ("attack", "step"):
        words = (*words, "--steps", "1")
    done = run(bare, "fasttht", "bench", *words, *(() if words[0] == "zeros" else ("--windows", "1")), "--cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["bench"] == words[0]


def test_a_loader_that_cannot_decode_says_what_to_install(bare: dict[str, str]) -> None:
    done = run(bare, "fasttht", "bench", "load", "--cpu")
    assert done.returncode == 2, done.stderr[-2000:]
    assert "expected OpenCV and Pillow" in done.stderr
    assert "Traceback" not in done.stderr
