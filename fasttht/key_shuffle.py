"""Shuffling BN: keys leave their batch's order, and their rank, before the momentum encoder normalises their groups.

The statistics that a key was normalised with then tell nothing about which query is its twin. The permutation of a
global batch is a draw of (seed, epoch, step, place in the batch): of nothing that only one rank or the device knows,
so that every rank has it at once, on the host, and with it how many images go where. It is the same for any number of
ranks, and so are the groups. What changes ranks are 8-bit pixels, before the augmentation, whose draws go by row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fasttht.attacks.pgd import Draw
from fasttht.distributed import World
from fasttht.pipelines.plan import hash_rows

STREAM_SHUFFLE = 0x5348

# Names under which the exchanges are counted.
IMAGES, FEATURES = "key images", "key features"

Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shuffle:
    """One step's permutation of the global batch; order (B,): which of its rows stands at each place."""

    world: World
    order: Places

    def deal(self, x: Tensor) -> Tensor:
        """Return the images of this rank's places, in their order, (n, 3, H, W) uint8 channels-last.

        x: those of this rank's slice of the batch, likewise.
        """
        world, total = self.world, len(self.order)
        rows = x.permute(0, 2, 3, 1)
        if world.size == 1:
            return rows[_there(self.order, x.device)].permute(0, 3, 1, 2)
        mine = world.rows(total)
        rank_of = np.repeat(np.arange(world.size), world.counts(total))  # of a row, and of a place
        source = rank_of[self.order]
        sent, wanted = source == world.rank, source[mine]
        out = rows[_there(self.order[sent] - mine.start, x.device)]
        sends, receives = (np.bincount(ranks, minlength=world.size).tolist() for ranks in (rank_of[sent], wanted))
        found = world.trade_rows(IMAGES, out, sends, receives)
        # They come sorted by rank, and of one rank in the order of their places.
        place = np.argsort(np.argsort(wanted, kind="stable"), kind="stable")
        return found[_there(place, x.device)].permute(0, 3, 1, 2)

    def at_my_places(self, values: Tensor) -> Tensor:
        """Return which of a value for each row of the batch, (B, ...), belong to the images of this rank's places."""
        return values[_there(self.order[self.world.rows(len(self.order))], values.device)]

    def gather(self, feat: Tensor) -> Tensor:
        """Return what all ranks made of their places' images, (n, D) here, in the batch's order: (B, D)."""
        found = self.world.gather_rows(FEATURES, feat, self.world.counts(len(self.order)))
        return torch.empty_like(found).index_copy_(0, _there(self.order, feat.device), found)


def draw_shuffle(total: int, draw: Draw, world: World) -> Shuffle:
    """Draw the permutation of a global batch of `total` images."""
    keys = hash_rows(STREAM_SHUFFLE, draw.seed, draw.epoch, draw.step, np.arange(total)).view(np.int64)
    return Shuffle(world, np.argsort(keys, kind="stable"))


def _there(places: Places, device: torch.device) -> Tensor:
    """Return indices on a device that the host does not wait for."""
    return torch.from_numpy(places).to(device, non_blocking=True)
