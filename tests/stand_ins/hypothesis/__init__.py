"""Stands for hypothesis where it is not installed: its tests are skipped, and those beside them in a file run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest

Test = TypeVar("Test", bound=Callable[..., Any])


def given(*_: object, **__: object) -> pytest.MarkDecorator:
    return pytest.mark.skip(reason="needs hypothesis")


def settings(*_: object, **__: object) -> Callable[[Test], Test]:
    return lambda test: test
