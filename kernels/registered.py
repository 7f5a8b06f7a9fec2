"""How an op is registered, and what one call of it does: check, then a kernel or the reference.

CPU tensors go straight to the reference, others through a registered op. Registered, an op is opaque to torch.compile
and is seen whole by dispatch modes and fake tensors.

Ops are defined by torch.library.Library, not by torch.library.custom_op: a backward pass makes some fifty calls of a
few microseconds each, and custom_op added 45 us to each where this adds 8 (torch 2.13, one core, 2026-11).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasttht.kernels import cuda, launches

Check = Callable[..., None]
Planner = Callable[..., launches.Plan]

LIBRARY = torch.library.Library("fasttht", "FRAGMENT")  # type: ignore[no-untyped-call]


def register(name: str, schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define an op for every device, and what it does to tensors without data."""
    LIBRARY.define(f"{name}{schema}", tags=[torch.Tag.pt2_compliant_tag])  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, body, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fasttht::{name}", fake, lib=LIBRARY)
    op: Callable[..., Any] = getattr(torch.ops.fasttht, name).default
    return op


def _launched(op: str, device: torch.device, plan: Planner, *args: Any) -> bool:
    """Launch what the plan says, and return whether there was a kernel for this call."""
    backend = cuda.backend(device)
    if backend is None:
        return False
    planned = plan(*args)
    if isinstance(planned, str):
        cuda.refuse(op, planned)
        return False
    for launch in planned:
        backend.launch(launch, device)
    cuda.ran[op, "cuda"] += 1
    return True


class InPlaceOp:
    """An op that writes into its arguments: its check, its kernel launches and its reference, registered as one."""

    def __init__(self, name: str, schema: str, check: Check, plan: Planner, run: Callable[..., None]) -> None:
        self._check = partial(check, name)
        self._run = run
        mutated = [i for i, arg in enumerate(schema[1:-1].split(", ")) if "!" in arg]

        def body(*args: Any) -> None:
            self._check(*args)
            if not _launched(name, args[0].device, plan, *args):
                run(*args)
                return
            # A kernel writes behind autograd's back; what was saved for a backward must be known to be stale.
            written = [args[i] for i in mutated if args[i] is not None and not args[i].is_inference()]
            torch.autograd.graph.increment_version(written)

        self._op = register(name, f"{schema} -> ()", body, self._check)

    def __call__(self, *args: Any) -> None:
        if args[0].is_cpu:
            self._check(*args)
            self._run(*args)
        else:
            self._op(*args)


class NewTensorOp:
    """An op that returns a new tensor. `empty` makes the one that the kernel fills, the plan's first argument."""

    def __init__(
        self,
        name: str,
        schema: str,
        check: Check,
        plan: Planner,
        run: Callable[..., Tensor],
        empty: Callable[..., Tensor],
    ) -> None:
        self._check = partial(check, name)
        self._run = run

        def body(*args: Any) -> Tensor:
            self._check(*args)
            if cuda.backend(args[0].device) is not None:
                out = empty(*args)
                if _launched(name, out.device, plan, out, *args):
                    return out
            return run(*args)

        self._op = register(name, f"{schema} -> Tensor", body, self._checked)

    def _checked(self, *args: Any) -> Tensor:
        self._check(*args)
        return self._run(*args)

    def __call__(self, *args: Any) -> Tensor:
        if args[0].is_cpu:
            return self._checked(*args)
        found: Tensor = self._op(*args)
        return found
