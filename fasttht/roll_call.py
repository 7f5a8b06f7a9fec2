"""Who is missing: after an exchange between ranks failed, find out which of them is dead, stuck or stopped by an error.

All that a broken exchange itself knows is that some neighbour hung up or did not answer. So the first rank that sees
one break raises an alarm in the store that torchrun keeps for its processes. A thread of every process looks for it,
and answers with what its rank is doing: who does not answer is dead or frozen; who answers that it is at its own work
is the slow one. Where no store is left, or none that answers, rank 0's process or machine is gone or frozen.
"""

from __future__ import annotations

import hashlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch._C._distributed_c10d import Store

from fasttht import log
from fasttht.errors import PeerError

# How often a rank looks for the alarm, and how long the others are given to answer it, in seconds.
_LOOK_S = 0.5
_ANSWER_S = 3.0

# How long after the alarm a rank that still waits for others is ended by its own thread.
_END_S = 20.0


# How long the store may take for one call. A frozen process that keeps it leaves calls without an end.
_SILENT_S = 10.0


class _Answering:
    """A store whose calls raise RuntimeError if it does not answer: a thread makes each, and may be left behind."""

    def __init__(self, store: Store) -> None:
        self._store, self._silent = store, False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._store, name)

        def call(*arguments: Any) -> Any:
            answer: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

            def ask() -> None:
                try:
                    answer.put((method(*arguments), None))
                except Exception as error:  # raised below, where somebody waits for it
                    answer.put((None, error))

            if self._silent:
                raise RuntimeError("the store does not answer")
            threading.Thread(target=ask, name="fasttht-store", daemon=True).start()
            try:
                found, error = answer.get(timeout=_SILENT_S)
            except queue.Empty:
                self._silent = True
                raise RuntimeError(f"the store has not answered for {_SILENT_S:g} s") from None
            if error is not None:
                raise error
            return found

        return call


class RollCall:
    """One rank's part of it. doing and step are set by the rank: what it waits for, and at which step it is."""

    def __init__(self, store: Store, rank: int, size: int, *, timeout_s: float) -> None:
        self.doing, self.step = "its own work", 0
        self.broken = False
        self._store, self._rank, self._size, self._timeout_s = _Answering(store), rank, size, timeout_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fasttht-roll-call", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)

    def report(self, sentence: str) -> None:
        """Tell the others why this rank ends; they will see its exchanges break.

        Where rank 0 itself keeps the store, it stays until those that are alive have asked, for a few seconds at most.
        """
        if not self.broken:
            self._set(f"error/{self._rank}", sentence)
        self.broken = True
        self._set(f"gone/{self._rank}", "")
        if self._rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        earliest = time.monotonic() + 2 * _LOOK_S
        with suppress(RuntimeError):
            self._store.compare_set("alarm", "", "the end")
            while (now := time.monotonic()) < earliest + _ANSWER_S:
                alive = self._answers().keys() | self._errors().keys()
                if now > earliest and alive <= self._found("gone").keys():
                    break
                time.sleep(0.05)

    def first(self, text: str) -> bool:
        """Return whether no other rank has said this yet: what all ranks find, one says."""
        try:
            return bool(self._store.add("said/" + hashlib.sha256(text.encode()).hexdigest(), 1) == 1)
        except RuntimeError:
            return True

    def take(self, name: str, cause: Exception) -> PeerError:
        """Return the error that says who is missing from the exchange `name`, which failed with `cause`."""
        self.broken = True
        doing = f"waits in {name!r}"
        try:
            where = self._store.compare_set("alarm", "", name).decode()
            self._store.set(f"here/{self._rank}", doing)
            deadline = time.monotonic() + _ANSWER_S
            while time.monotonic() < deadline and len(self._answers()) < self._size and not self._errors():
                time.sleep(0.05)
            answers, errors = self._answers(), self._errors()
        except RuntimeError:
            return PeerError(
                f"{name}: rank {self._rank} lost the others, and the store that knows them: rank 0's process or "
                f"machine is gone or frozen ({_first_line(cause)})"
            )
        if errors:
            rank, sentence = next(iter(errors.items()))
            return PeerError(f"rank {rank} ended: {sentence}", told=True)
        silent = [str(rank) for rank in range(self._size) if rank not in answers]
        if silent:
            return PeerError(
                f"rank {' and '.join(silent)} does not answer, dead or frozen: the run ends at step {self.step}, in "
                f"{where!r}; the same command continues from the last checkpoint"
            )
        late = [rank for rank, said in answers.items() if not said.startswith("waits")]
        if late:
            told = "; ".join(f"rank {rank} is at {answers[rank]}" for rank in late)
            return PeerError(
                f"{told}; the others have waited for it in {where!r} for {self._timeout_s:g} s: find what holds it, or "
                "raise --dist-timeout"
            )
        return PeerError(f"{where}: the ranks lost each other at step {self.step} ({_first_line(cause)})")

    def _watch(self) -> None:
        """Answer an alarm, and end the process if its rank does not do so itself: the body of the thread."""
        answered_at = None
        while not self._stop.wait(_LOOK_S):
            try:
                if answered_at is None and self._store.check(["alarm"]):
                    waits = self.doing != "its own work"
                    said = f"waits in {self.doing!r}" if waits else f"step {self.step}, in {self.doing}"
                    if not self._store.check([f"here/{self._rank}"]):
                        self._store.set(f"here/{self._rank}", said)
                    answered_at = time.monotonic()
            except RuntimeError:
                return
            if answered_at is not None and not self.broken and time.monotonic() > answered_at + _END_S:
                self.broken = True
                with suppress(RuntimeError):
                    if not self._found("gone"):  # they have said more than this rank knows
                        log.fail(f"{self.doing!r} at step {self.step} has no end: another rank gave up the run")
                sys.stderr.flush()
                os._exit(PeerError.exit_code)

    def _answers(self) -> dict[int, str]:
        return self._found("here")

    def _errors(self) -> dict[int, str]:
        return self._found("error")

    def _found(self, kind: str) -> dict[int, str]:
        keys = {rank: f"{kind}/{rank}" for rank in range(self._size)}
        return {rank: self._store.get(key).decode() for rank, key in keys.items() if self._store.check([key])}

    def _set(self, key: str, value: str) -> None:
        with suppress(RuntimeError):  # with the store the others are gone too
            self._store.set(key, value)


def _first_line(error: BaseException) -> str:
    text: str = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text.split("] ", 1)[-1][:120]
