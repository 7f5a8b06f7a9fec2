"""What a loop needs of the two things it moves along: where batches come from, and what a step changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fasttht.metrics import Meter

Item_co = TypeVar("Item_co", covariant=True)


class Feed(Protocol[Item_co]):
    """What a loop needs of its loader; see pipelines/loader.py."""

    @property
    def step(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def wait_s(self) -> float: ...
    @property
    def bad_rows(self) -> set[int]: ...
    def __iter__(self) -> Iterator[Item_co]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class State(Protocol):
    """What a loop needs of the state that its steps change."""

    step: int
    meter: Meter
    lr: Tensor
    scaler: torch.amp.GradScaler
    amp_dtype: torch.dtype

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the live tensors of this rank, by file and name."""
        ...

    def to_save(self) -> dict[str, dict[str, Tensor]] | None:
        """Return the tensors of a checkpoint, by file and name; None on ranks that write none."""
        ...

    def to_load(self) -> AbstractContextManager[dict[str, dict[str, Tensor]]]:
        """Give the tensors to copy a checkpoint into."""
        ...

    def depends_on(self) -> dict[str, str]:
        """Return digests, by name, of what the steps read and no checkpoint holds."""
        ...
