"""What tests of loaders share."""

import gc
import threading
import time
from collections.abc import Callable

import pytest


@pytest.fixture
def no_loader_threads() -> Callable[[], None]:
    """Return a check that all threads of all loaders end; those of a forgotten one do so in their own time."""

    def check() -> None:
        gc.collect()
        deadline = time.monotonic() + 20
        while (left := [t.name for t in threading.enumerate() if t.name.startswith("fasttht")]) and (
            time.monotonic() < deadline
        ):
            time.sleep(0.01)
        assert left == []

    return check
