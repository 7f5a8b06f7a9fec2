"""Skips the test that asks for anything in here."""

from __future__ import annotations

from typing import Any

import pytest


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    pytest.skip("needs scipy")
