"""The fused ops, and which implementation of them runs: `implementation()` says it, and why, in one sentence.

`reference` is what each op means, in plain torch. CPU tensors always get it; CUDA tensors get the kernels of `src/`
where those can be compiled and take the call.
"""

if __name__ != "fasttht.kernels":
    raise ImportError(f"import this package as 'fasttht.kernels', not {__name__!r}; run 'pip install -e .' once")

from fasttht.kernels.batch_norm import bn_relu
from fasttht.kernels.convs import conv_add_relu, conv_relu
from fasttht.kernels.cuda import Implementation, implementation
from fasttht.kernels.draws import draw_rows, draw_target, int64
from fasttht.kernels.noise import draw_gaussian_start, draw_l2_start
from fasttht.kernels.ops import (
    bank_write_,
    draw_lattice_start,
    draw_lattice_start_at,
    draw_start,
    draw_start_at,
    drelu_add_,
    empty_model_input,
    free_delta_step_,
    model_input_,
    pgd_lattice_step_,
    pgd_lattice_step_input_,
    pgd_linf_step_,
    pgd_linf_step_input_,
    u8_to_input,
)
from fasttht.kernels.packed import PackedConv
from fasttht.kernels.reference import (
    STEM_CONV,
    Layout,
    clip_to_ball_,
    image_grad,
    input_shape,
    model_input,
    per_channel,
    stem_weight,
)

__all__ = [
    "STEM_CONV",
    "Implementation",
    "Layout",
    "PackedConv",
    "bank_write_",
    "bn_relu",
    "clip_to_ball_",
    "conv_add_relu",
    "conv_relu",
    "draw_gaussian_start",
    "draw_l2_start",
    "draw_lattice_start",
    "draw_lattice_start_at",
    "draw_rows",
    "draw_start",
    "draw_start_at",
    "draw_target",
    "drelu_add_",
    "empty_model_input",
    "free_delta_step_",
    "image_grad",
    "implementation",
    "input_shape",
    "int64",
    "model_input",
    "model_input_",
    "per_channel",
    "pgd_lattice_step_",
    "pgd_lattice_step_input_",
    "pgd_linf_step_",
    "pgd_linf_step_input_",
    "stem_weight",
    "u8_to_input",
]
