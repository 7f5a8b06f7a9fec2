"""What the loader asks of a decoder: one step's rows in, one uint8 tensor out, the bad rows named.

Windows and flips come with the request, so a decoder draws nothing and keeps no state between requests: the same
request gives the same pixels, whatever was decoded before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fasttht.pipelines.plan import Index, Windows


class Cut(NamedTuple):
    """How one image is cut. shape: the announced (height, width). window: (top, left, height, width) in it.

    short_side: None to resize the window to the output; else the evaluation's geometry: resize the whole image until
    its short side has so many pixels, then take the centre.
    """

    shape: tuple[int, int]
    window: tuple[int, int, int, int]
    flip: bool
    short_side: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One step's share of one rank. All arrays have B rows.

    index: dataset rows, int64. shapes: announced (height, width). windows: (top, left, height, width). flips: mirror
    left to right. short_side: see Cut; the windows are then whole images.
    """

    index: Index
    shapes: Index
    windows: Windows
    flips: npt.NDArray[np.bool_]
    short_side: int | None = None

    def cut(self, position: int) -> Cut:
        """Return how the image at one position is cut, as Python numbers."""
        height, width = self.shapes[position].tolist()
        top, left, cut_height, cut_width = self.windows[position].tolist()
        window = (top, left, cut_height, cut_width)
        return Cut((height, width), window, bool(self.flips[position]), self.short_side)


class Decoded(NamedTuple):
    """pixels (B, S, S, 3) uint8, C order; bad: (position, reason) of rows that could not be decoded, ascending.

    The pixels of a bad row are undefined. If `pixels` is on the CPU it is memory of `HostMemory`, else it lies on the
    loader's device and was written on the stream that was current when `result` was called.
    """

    pixels: Tensor
    bad: tuple[tuple[int, str], ...]


class Job(Protocol):
    """A request under way."""

    def wait(self, seconds: float) -> bool:
        """Wait at most so long; return whether `result` will not block."""
        ...

    def result(self) -> Decoded:
        """Return the pixels. Raises: whatever went wrong, other than with a single row."""
        ...


class Decoder(Protocol):
    """One way from stored bytes to pixels. Jobs are started, and their results taken, in the same order."""

    name: str

    def start(self, request: Request) -> Job: ...
    def close(self) -> None:
        """End its threads and free what it holds; a second call does nothing."""
        ...
