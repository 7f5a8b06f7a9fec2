"""Who is missing, where the store that all ask is as silent as the rank that keeps it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from torch.distributed import HashStore

from fasttht import roll_call
from fasttht.roll_call import RollCall


class Frozen:
    """A store whose calls have no end until it is thawed."""

    def __init__(self) -> None:
        self.thawed = threading.Event()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.thawed.wait()
            raise RuntimeError("too late")

        return call


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[RollCall]:
    monkeypatch.setattr(roll_call, "_SILENT_S", 0.2)
    store = Frozen()
    calls = RollCall(store, 1, 3, timeout_s=5)  # type: ignore[arg-type]
    yield calls
    store.thawed.set()
    calls.close()


def test_a_store_that_does_not_answer_is_taken_for_rank_0s_end(frozen: RollCall) -> None:
    """Without torchrun's agent rank 0 keeps it; frozen, it would hold whoever asks for ever."""
    begun = time.monotonic()
    error = frozen.take("gradients", TimeoutError("no answer"))
    assert "gradients: rank 1 lost the others" in str(error)
    assert "rank 0's process or machine is gone or frozen" in str(error)
    frozen.report("and says so")
    assert frozen.first("a sentence")
    assert time.monotonic() - begun < 5


def test_what_a_store_answers_or_raises_goes_through() -> None:
    store = roll_call._Answering(HashStore())
    store.set("key", "value")
    assert store.get("key") == b"value"
    assert store.add("count", 2) == 2
    assert store.check(["key"])
    assert not store.check(["nothing"])
    with pytest.raises(TypeError):
        store.set()
