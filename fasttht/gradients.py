"""What ranks exchange for an update: gradients, summed while the backward still runs, and BN's running statistics.

Why not torch's DistributedDataParallel. It averages over ranks, which is the global batch's mean only if all slices
are equal, and it wants to own the forward: free training's replays, the parts of an accumulated batch, the attack and
the step engines would each need it told when to synchronise. A hook on each parameter needs none of that. Every part's
loss is weighted with its share of the global batch (steps.py), so that the plain sum over ranks is the gradient that
one process would have; buckets of it leave, in the same order everywhere, as soon as the last part's backward has
filled them. Nothing else listens: not the attack, which asks for input gradients only, nor delta, whose gradient is its
own rank's.

A gradient that is not finite on one rank is not finite in the sum, so that all ranks skip the same updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fasttht.distributed import Pending, World

# Names under which the exchanges are counted.
GRADIENTS, STATISTICS = "gradients", "BN running statistics"

# Bytes of one bucket: as DistributedDataParallel's, large enough for the wire, small enough to leave early.
BUCKET_BYTES = 25 * 2**20


@dataclass
class _Bucket:
    parameters: list[nn.Parameter]
    left: int
    flat: Tensor | None = None
    pending: Pending | None = None


class Reducer:
    """Makes the accumulated gradients, and the running statistics, those of the global batch.

    buffers: float tensors that each rank's forward moves by itself, averaged with the ranks' images as weights once
    per update: else every rank would attack another network. A network must give every parameter a gradient; one
    without counts as zero.
    """

    def __init__(
        self, world: World, parameters: Sequence[nn.Parameter], buffers: Sequence[Tensor], *, bytes_: int = BUCKET_BYTES
    ) -> None:
        self._world, self._buffers = world, list(buffers)
        self._buckets = _cut(parameters, bytes_)
        self._armed, self._next = False, 0
        self._statistics: tuple[Tensor, Pending] | None = None
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(self._hook_of(bucket))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def begin(self, share: float) -> None:
        """To be called between an update's last forward and its backward; share: this rank's of the global batch."""
        self._armed, self._next = True, 0
        for bucket in self._buckets:
            bucket.left = len(bucket.parameters)
        if self._buffers:
            flat = torch.cat([buffer.flatten() for buffer in self._buffers]).mul_(share)
            self._statistics = flat, self._world.sum_later(STATISTICS, flat)

    @torch.no_grad()
    def finish_(self) -> None:
        """Wait for what is under way and write it into the gradients and the buffers. Does not wait for the device."""
        if not self._armed:
            return  # the update that follows has no backward before it: there is nothing to bring together
        self._armed = False
        for bucket in self._buckets[self._next :]:
            self._send(bucket)
        for bucket in self._buckets:
            assert bucket.flat is not None, "it was sent"
            assert bucket.pending is not None, "it was sent"
            bucket.pending.wait()
            _write(bucket.flat, bucket.parameters)
            bucket.flat = bucket.pending = None
        if self._statistics is not None:
            flat, pending = self._statistics
            self._statistics = None
            pending.wait()
            parts = torch.split(flat, [buffer.numel() for buffer in self._buffers])
            for buffer, part in zip(self._buffers, parts, strict=True):
                buffer.copy_(part.view_as(buffer))

    def _hook_of(self, bucket: _Bucket) -> Callable[[Tensor], None]:
        def ready(_: Tensor) -> None:
            if not self._armed:
                return
            bucket.left -= 1
            # In order, whatever order a backward takes: ranks must send the same bucket.
            while self._next < len(self._buckets) and self._buckets[self._next].left == 0:
                self._send(self._buckets[self._next])
                self._next += 1

        return ready

    @torch.no_grad()
    def _send(self, bucket: _Bucket) -> None:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket.parameters]
        # In memory order: copying back into the same strides then moves nothing around.
        bucket.flat = torch.cat([_dense(gradient) for gradient in gradients])
        bucket.pending = self._world.sum_later(GRADIENTS, bucket.flat)


def _cut(parameters: Sequence[nn.Parameter], bytes_: int) -> list[_Bucket]:
    """Cut the parameters into buckets, last layers first: a backward reaches them first. One type in each."""
    buckets: list[_Bucket] = []
    size = 0
    for parameter in reversed(parameters):
        own = parameter.numel() * parameter.element_size()
        if not buckets or size + own > bytes_ or buckets[-1].parameters[0].dtype != parameter.dtype:
            buckets.append(_Bucket([], 0))
            size = 0
        buckets[-1].parameters.append(parameter)
        size += own
    return buckets


def _dense(tensor: Tensor) -> Tensor:
    """Return the elements in a fixed order, the channels-last one for images' weights; a view where that is theirs."""
    return (tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor).reshape(-1)


def _write(flat: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    for parameter, part in zip(parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.ndim == 4:
            rows, channels, height, width = parameter.shape
            parameter.grad.copy_(part.view(rows, height, width, channels).permute(0, 3, 1, 2))
        else:
            parameter.grad.copy_(part.view_as(parameter))
