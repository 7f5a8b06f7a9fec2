"""Made-up pixels that already lie on the device: the ceiling that a loader is compared with."""

from __future__ import annotations

import numpy as np
import torch

from fasttht.pipelines.decoder import Decoded, Request
from fasttht.pipelines.plan import mix64


class SyntheticDecoder:
    """Gives every request the same noise, without touching the samples; labels and rows are the plan's.

    All batches share one tensor: a consumer must not write to it.
    """

    name = "synthetic"

    def __init__(self, *, img_size: int, device: torch.device) -> None:
        self._img_size = img_size
        self._device = device
        self._pixels = torch.empty(0)

    def start(self, request: Request) -> _Done:
        num = len(request.index)
        if len(self._pixels) < num:
            words = np.arange(-(-num * self._img_size**2 * 3 // 8), dtype=np.uint64)
            noise = mix64(words).view(np.uint8)[: num * self._img_size**2 * 3]
            shape = (num, self._img_size, self._img_size, 3)
            self._pixels = torch.from_numpy(noise.reshape(shape)).to(self._device)
        return _Done(Decoded(self._pixels[:num], ()))

    def close(self) -> None:
        self._pixels = torch.empty(0)


class _Done:
    """A job with nothing left to do."""

    def __init__(self, decoded: Decoded) -> None:
        self._decoded = decoded

    def wait(self, seconds: float) -> bool:
        return True

    def result(self) -> Decoded:
        return self._decoded
