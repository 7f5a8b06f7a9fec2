"""Regions: what a watcher is told, that nobody is told anything otherwise, and that a step is the same either way."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest

from fasttht.distributed import World
from fasttht.regions import region, waited_for, watched
from fasttht.roll_call import RollCall


class Diary:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def enter(self, name: str) -> None:
        self.lines.append(f"enter {name}")

    def leave(self) -> None:
        self.lines.append("leave")


@region("whole")
def work(*, fail: bool = False) -> int:
    with region("part"):
        if fail:
            raise ValueError("work failed")
    return 3


def test_a_watcher_is_told_of_regions_in_order_and_nested() -> None:
    diary = Diary()
    with watched(diary):
        assert work() == 3
    assert diary.lines == ["enter whole", "enter part", "leave", "leave"]


def test_nobody_is_told_before_or_after() -> None:
    diary = Diary()
    work()
    with watched(diary):
        pass
    work()
    assert diary.lines == []


def test_regions_are_left_by_an_error_which_goes_on_and_ends_the_watch() -> None:
    diary = Diary()
    with pytest.raises(ValueError, match="work failed"), watched(diary):
        work(fail=True)
    assert diary.lines.count("leave") == 2
    work()
    assert len(diary.lines) == 4


def test_one_region_may_be_entered_while_it_is_open() -> None:
    diary, again = Diary(), region("again")
    with watched(diary), again, again:
        pass
    assert diary.lines == ["enter again", "enter again", "leave", "leave"]


def test_a_second_watcher_is_refused_and_the_first_one_stays() -> None:
    diary = Diary()
    with watched(diary):
        with pytest.raises(RuntimeError, match="second one"), watched(Diary()):
            pass
        work()
    assert len(diary.lines) == 4


def test_a_decorated_function_keeps_its_name() -> None:
    assert work.__name__ == "work"


def test_waiting_for_items_is_a_region_and_using_them_is_not() -> None:
    diary = Diary()

    def made() -> Iterator[str]:
        for item in "ab":
            diary.enter(f"making {item}")
            yield item

    with watched(diary):
        for item in waited_for(made()):
            diary.enter(f"using {item}")
    wait, leave = "enter data_wait", "leave"
    assert diary.lines == [
        wait, "enter making a", leave, "enter using a", wait, "enter making b", leave, "enter using b", wait, leave,
    ]  # fmt: skip


def test_an_item_is_let_go_before_the_next_is_waited_for() -> None:
    class Item:
        pass

    alive: list[int] = []
    known: weakref.WeakSet[Item] = weakref.WeakSet()

    def made() -> Iterator[Item]:
        for _ in range(3):
            alive.append(len(known))
            known.add(item := Item())
            yield item
            del item

    for item in waited_for(made()):
        del item
    assert alive == [0, 0, 0]


def test_an_exchange_with_other_processes_is_a_region() -> None:
    diary, calls = Diary(), RollCall.__new__(RollCall)
    with watched(diary), World(0, 2, roll_call=calls).exchange("gradients"):
        diary.enter("waiting")
    assert diary.lines == ["enter comm", "enter waiting", "leave"]
