// Write the model's input from the pixels. STATE: float or Byte; LAID: float, Half or BFloat16; LAYOUT: see layout.cuh.
#include "layout.cuh"

extern "C" __global__ void model_input(
    LAID* out, const STATE* x, Int64 batch, Int64 height, Int64 width,
    float mean0, float mean1, float mean2, float std0, float std1, float std2
) {
    step_and_lay_out<LAYOUT, false, STATE, LAID>(
        const_cast<STATE*>(x), nullptr, nullptr, out, Images{batch, height, width},
        Normalize{{mean0, mean1, mean2}, {std0, std1, std2}}, 0, 0
    );
}
