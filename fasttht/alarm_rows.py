"""Alarms, and the accuracies of an evaluation's row as the checks that raise them want to read them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any


@dataclass(frozen=True)
class Alarm:
    """Something that does not add up: a name, and a sentence with the numbers and who describes the sign."""

    name: str
    text: str


@dataclass(frozen=True)
class Pgd:
    """A PGD accuracy. eps: None for the row's own radius; loss ce, margin or dlr; goal untargeted or another."""

    name: str
    top1: float
    steps: int
    norm: str
    goal: str
    loss: str
    eps: float | None
    restarts: str


@dataclass(frozen=True)
class View:
    """One norm of a row."""

    row: Mapping[str, Any]
    norm: str
    pgd: tuple[Pgd, ...]
    cosine: bool
    chance: float

    @property
    def images(self) -> int:
        return int(self.row["images"])

    @property
    def clean(self) -> float | None:
        return self.row.get("clean_top1")

    @property
    def broken(self) -> float:
        """An accuracy that counts as none: half of chance, or one percent."""
        return max(1.0, self.chance / 2)

    @property
    def widest(self) -> float | None:
        """The radius that holds every image, see `widest`."""
        return widest({"": "linf", "_l2": "l2"}.get(self.norm, "l2-relative"), self.row.get("img_size"))

    def get(self, name: str) -> float | None:
        """Return the accuracy of an attack that is no PGD."""
        return self.row.get(f"{name}{self.norm}_top1")

    def untargeted(self) -> list[Pgd]:
        """Return the untargeted attacks of the row's own radius that take steps."""
        return [p for p in self.pgd if p.goal == "" and p.eps is None and p.steps > 0]

    def strongest(self) -> Pgd | None:
        """Return the untargeted attack that leaves least, of whatever loss."""
        return min(self.untargeted(), key=lambda p: p.top1, default=None)

    def noise(self) -> float | None:
        found = [p.top1 for p in self.pgd if p.steps == 0 and p.eps is None and not p.restarts]
        given = self.get("noise")
        return given if given is not None else min(found, default=None)

    def chance_gap(self, a: float, b: float) -> float:
        """Return two standard errors of the difference of two independent accuracies, in points."""
        return 2 * math.sqrt(max(a * (100 - a) + b * (100 - b), 0) / self.images)

    def nested_gap(self, gap: float) -> float:
        """Return two standard errors of the share of images that one attack breaks beyond another, in points."""
        return 2 * math.sqrt(max(gap * (100 - gap), 0) / self.images)


def widest(norm: str, img_size: int | None) -> float | None:
    """Return the least radius whose ball around any image holds every other, in [0, 1] pixels of three channels.

    In linf 1, in l2 the distance from black to white, which takes a size to know; none that is relative to the image
    holds what is far from a dark one.
    """
    if norm == "linf":
        return 1.0
    return None if norm != "l2" or img_size is None else math.sqrt(3) * img_size


def parse(row: Mapping[str, Any]) -> Iterator[Pgd]:
    """Yield the PGD accuracies of a row: pgd10[_l2[_relative]][_targeted|_least_likely][_margin|_dlr][_eps0.1][_r5]."""
    for key, value in row.items():
        found = re.fullmatch(
            r"pgd(\d+)(_l2(?:_relative)?|)(_targeted|_least_likely|)(_margin|_dlr|)(?:_eps([^_]+))?(_r\d+|)_top1", key
        )
        if found is None or value is None:
            continue
        steps, norm, goal, loss, eps, restarts = found.groups()
        radius = None if eps is None else float(Fraction(eps))
        yield Pgd(
            key.removesuffix("_top1"), float(value), int(steps), norm, goal, loss[1:] or "ce", radius, restarts or ""
        )


def series(pgd: list[Pgd], key: Callable[[Pgd], tuple[Any, ...]]) -> list[list[Pgd]]:
    """Return the attacks that agree in `key`, for all keys."""
    groups: dict[tuple[Any, ...], list[Pgd]] = {}
    for p in pgd:
        groups.setdefault(key(p), []).append(p)
    return list(groups.values())
