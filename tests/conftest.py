"""What every test gets: a device, the same random state as every other test, a torchvision that imports."""

import importlib
import importlib.util
import os
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import rich.style  # noqa: F401 -- draws a random number when first imported
import torch

# Stock FFCV computes through numba, whose pool of TBB threads does not survive a fork in the process (some tests do):
# when the interpreter then ends, it may wait for them for ever.
os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")

# Last in the path: a machine with a GPU may have torch, numpy and pytest alone, and its tests stand beside others.
sys.path.append(str(Path(__file__).with_name("stand_ins")))
# Nor has it these, whose tests need no GPU.
ONLY_ELSEWHERE = ("cv2", "PIL", "sklearn", "skimage", "matplotlib")

GPU_REASON = "needs a CUDA device; runs in tools/gpu_check.sh"

# The random state that every test starts from. Filled once per session, before the first test.
_start: dict[str, Any] = {}


def pytest_sessionstart() -> None:
    torch.set_num_threads(1)  # networks this small only wait for a second thread
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 -- the legacy global state is what the guard below watches
    _start.update(_random_states())


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Asked here and not at import: collecting the tests must not touch a GPU.
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip(GPU_REASON)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """Under `-m gpu` leave out, instead of failing, files that import what such a machine need not have."""
    report: Any = yield
    missing = re.search(r"ModuleNotFoundError: No module named '(\w+)", str(report.longrepr))
    if collector.config.option.markexpr == "gpu" and report.outcome == "failed" and missing:
        name = missing[1]
        if name in ONLY_ELSEWHERE and importlib.util.find_spec(name) is None:
            report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: needs {name}")
    return report


def _random_states() -> dict[str, Any]:
    numpy_state: Any = np.random.get_state()  # noqa: NPY002
    name, keys, *rest = numpy_state
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, keys.tobytes(), *rest),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["torch.cuda"] = [state.numpy().tobytes() for state in torch.cuda.get_rng_state_all()]
    return states


def _restore_start() -> None:
    random.setstate(_start["python"])
    name, keys, *rest = _start["numpy"]
    np.random.set_state((name, np.frombuffer(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(torch.frombuffer(bytearray(_start["torch"]), dtype=torch.uint8))


@pytest.fixture(autouse=True)
def _random_state_guard(request: pytest.FixtureRequest) -> Iterator[None]:
    """Start each test from one global random state, and fail a test that leaves another behind.

    Draws come from seeded generators or from the counter-based hash; a test that must use the global state
    (building a network does) says so with @pytest.mark.changes_rng.
    """
    _restore_start()
    before = _random_states()
    yield
    after = _random_states()
    _restore_start()
    changed = [source for source in before if before[source] != after[source]]
    if changed and request.node.get_closest_marker("changes_rng") is None:
        pytest.fail(
            f"global random state: expected it unchanged after the test, got another one in {changed}; "
            "draw from a generator, or mark the test changes_rng",
            pytrace=False,
        )


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    """torchvision with torchvision.models imported: the oracle for our ResNets, used by tests only.

    Beside a torch of another build (CPU-only) its compiled ops do not load, and it stops at the first Python
    registration for one of them. Declaring those two schemas is enough for everything but the ops themselves.
    """
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision; run: bash tools/test.sh")
    try:
        importlib.import_module("torchvision.models")
    except RuntimeError as err:
        if "torchvision::nms" not in str(err):
            raise
        for op in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{op}", schema)
        importlib.import_module("torchvision.models")
    return importlib.import_module("torchvision")
