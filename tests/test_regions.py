"""Regions: what a watcher is told, that nobody is told anything otherwise, and that a step is the same either way."""

from __future__ import annotations

import pytest

from fasttht.regions import region, watched


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
