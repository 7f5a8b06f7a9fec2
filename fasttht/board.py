"""The copy of a run's rows that TensorBoard shows (`--tensorboard`)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from fasttht.errors import UsageError


class Board:
    """Writes rows to tb/ in a run folder, if it is wanted. Raises: UsageError if it is, and the package is missing."""

    def __init__(self, folder: Path, *, wanted: bool) -> None:
        if wanted and importlib.util.find_spec("tensorboard") is None:
            raise UsageError(
                '--tensorboard: expected the tensorboard package, got none; run: pip install "fasttht[tensorboard]"'
            )
        self._folder, self._wanted = folder, wanted
        self._writer: Any = None

    def add(self, row: dict[str, Any], step: int) -> None:
        """Write the numbers of a row."""
        if not self._wanted:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder / "tb"))
        for name, value in row.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()
