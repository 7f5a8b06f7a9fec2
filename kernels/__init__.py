"""The fused ops, and which implementation of them runs.

Callers use these names; today each is its plain-torch reference.
"""

if __name__ != "fasttht.kernels":
    raise ImportError(f"import this package as 'fasttht.kernels', not {__name__!r}; run 'pip install -e .' once")

from fasttht.kernels.reference import (
    bank_write_,
    clip_to_ball_,
    draw_start,
    draw_target,
    free_delta_step_,
    pgd_linf_step_,
    u8_to_input,
)

__all__ = [
    "bank_write_",
    "clip_to_ball_",
    "draw_start",
    "draw_target",
    "free_delta_step_",
    "pgd_linf_step_",
    "u8_to_input",
]
