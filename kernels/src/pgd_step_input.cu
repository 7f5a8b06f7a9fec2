// One linf step, in place, and the model's next input, in one pass over memory.
// STATE: float or Byte; LAID: float, Half or BFloat16, of the gradient and of the input; LAYOUT: see layout.cuh.
#include "layout.cuh"

extern "C" __global__ void pgd_step_input(
    STATE* x_adv, const LAID* grad, const STATE* x, LAID* out, Int64 batch, Int64 height, Int64 width,
    Pixel<STATE>::Distance eps, Pixel<STATE>::Distance alpha,
    float mean0, float mean1, float mean2, float std0, float std1, float std2
) {
    step_and_lay_out<LAYOUT, true, STATE, LAID>(
        x_adv, grad, x, out, Images{batch, height, width},
        Normalize{{mean0, mean1, mean2}, {std0, std1, std2}}, eps, alpha
    );
}
