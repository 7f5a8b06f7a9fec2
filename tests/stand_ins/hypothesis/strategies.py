"""Every strategy, and what is made of one: nothing, since no test that takes it runs."""

from __future__ import annotations

from typing import Any


class _Anything:
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: object, **__: object) -> Any:
        return self


def __getattr__(name: str) -> Any:
    return getattr(_Anything(), name)
