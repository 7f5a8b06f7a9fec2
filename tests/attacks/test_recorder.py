"""The recorder of CUDA graphs, with torch.cuda played by others: order of calls, streams, memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from fasttht.attacks.graph import CudaRecorder
from fasttht.attacks.pgd import Attacked

STEP, GRAPH = 50, 5  # bytes: the peak of a step, and what a capture keeps


class Stage:
    """What was called, which stream is current, and how much memory there is."""

    def __init__(self, room: int) -> None:
        self.calls: list[str] = []
        self.captures: list[dict[str, Any]] = []
        self.room, self.reserved = room, 10
        self.segments: list[dict[str, Any]] = []
        self.current = self.main = Stream(self, "main")


class Stream:
    def __init__(self, stage: Stage, name: str = "side") -> None:
        self.stage, self.name = stage, name

    def wait_stream(self, other: Stream) -> None:
        self.stage.calls.append(f"{self.name} waits for {other.name}")


class Graph:
    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def replay(self) -> None:
        self.stage.calls.append("replay")

    def reset(self) -> None:
        self.stage.calls.append("reset")


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Stage]:
    signature = inspect.signature(torch.cuda.graph)

    def begin(room: int) -> Stage:
        stage = Stage(room)

        @contextmanager
        def on(stream: Stream) -> Iterator[None]:
            before, stage.current = stage.current, stream
            yield
            stage.current = before

        @contextmanager
        def capture(*args: Any, **options: Any) -> Iterator[None]:
            stage.captures.append(signature.bind(*args, **options).arguments)
            stage.current = options["stream"]
            stage.calls.append("capture")
            yield  # torch's own, too, leaves its stream the current one after an error
            stage.reserved += GRAPH
            stage.current = stage.main

        def set_stream(stream: Stream) -> None:
            stage.current = stream

        played: dict[str, Any] = {
            "Stream": lambda: Stream(stage), "CUDAGraph": lambda: Graph(stage), "graph": capture, "stream": on,
            "set_stream": set_stream, "device": lambda device: nullcontext(), "current_stream": lambda: stage.current,
            "graph_pool_handle": lambda: (0, 7), "current_device": lambda: 0,
            "memory_snapshot": lambda: stage.segments, "empty_cache": lambda: stage.calls.append("empty"),
            "memory_reserved": lambda: stage.reserved, "max_memory_allocated": lambda: STEP,
            "mem_get_info": lambda: (stage.room - stage.reserved, stage.room),
        }  # fmt: skip
        for name, player in played.items():
            monkeypatch.setattr(torch.cuda, name, player)
        return stage

    return begin


def attack_on(stage: Stage, failing: int = 0) -> Callable[[], Attacked]:
    runs: list[int] = []

    def run() -> Attacked:
        runs.append(0)
        stage.calls.append(f"run on {stage.current.name}")
        if len(runs) == failing:
            raise RuntimeError("operation not permitted")
        return Attacked(torch.full((1,), float(len(runs))), torch.zeros(()), torch.zeros(()))

    return run


def test_an_attack_runs_once_beside_the_stream_and_is_then_captured_there(play: Callable[[int], Stage]) -> None:
    stage = play(1000)
    recorder = CudaRecorder(torch.device("cuda", 0))
    attacked, replay = recorder.record(attack_on(stage))
    assert stage.calls == [
        "side waits for main", "run on side", "main waits for side", "empty", "capture", "run on side",
    ]  # fmt: skip
    assert float(attacked.x_adv) == 2  # what the captured run returned
    assert stage.current is stage.main
    replay()
    assert stage.calls[-1] == "replay"
    recorder.record(attack_on(stage))
    one, other = stage.captures
    assert one["capture_error_mode"] == "thread_local"
    assert one["pool"] is other["pool"]
    assert one["stream"] is other["stream"]
    assert one["cuda_graph"] is not other["cuda_graph"]


@pytest.mark.parametrize("failing", [1, 2], ids=["warm-up", "capture"])
def test_after_an_error_the_stream_is_the_one_before(play: Callable[[int], Stage], failing: int) -> None:
    stage = play(1000)
    with pytest.raises(RuntimeError, match="operation not permitted"):
        CudaRecorder(torch.device("cuda", 0)).record(attack_on(stage, failing))
    assert stage.current is stage.main
    assert stage.calls[-1] == "empty"
    assert "replay" not in stage.calls


def test_graphs_that_leave_no_room_for_a_step_are_given_up(play: Callable[[int], Stage]) -> None:
    """Steps of 50 bytes want 55; a graph keeps 5: two fit in 66, the third does not."""
    stage = play(66)
    recorder = CudaRecorder(torch.device("cuda", 0))
    recorder.record(attack_on(stage))
    recorder.record(attack_on(stage))
    assert "reset" not in stage.calls
    with pytest.raises(torch.OutOfMemoryError):
        recorder.record(attack_on(stage))
    assert stage.calls[-2:] == ["reset", "empty"]


def test_memory_of_other_recorders_graphs_is_no_room(play: Callable[[int], Stage]) -> None:
    """66 bytes are enough for two graphs; not if 2 of those that are reserved lie in another pool of this device."""
    for segments, enough in (
        ([{"device": 0, "segment_pool_id": (0, 3), "total_size": 2}], False),
        ([{"device": 1, "segment_pool_id": (0, 3), "total_size": 2}], True),
        ([{"device": 0, "segment_pool_id": (0, 0), "total_size": 2}], True),
        ([{"device": 0, "segment_pool_id": (0, 7), "total_size": 2}], True),
    ):
        stage = play(66)
        recorder = CudaRecorder(torch.device("cuda", 0))
        recorder.record(attack_on(stage))
        stage.segments = segments
        if enough:
            recorder.record(attack_on(stage))
        else:
            with pytest.raises(torch.OutOfMemoryError):
                recorder.record(attack_on(stage))
