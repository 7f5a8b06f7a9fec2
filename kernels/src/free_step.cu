// Ascend the perturbation of free training and clip it to +-eps, in place; stay where *skip is 1.
#include "linf.cuh"

HOST_DEVICE float free_step_of(float delta, float grad, float step, float eps) {
    return at_most(at_least(delta + float(sign_of(grad)) * step, -eps), eps);
}

extern "C" __global__ void free_step(
    float* delta, const float* grad, const float* skip, float eps, float alpha, Int64 size
) {
    constexpr int N = vector_width<float>();
    float step = alpha * (1.0f - *skip);
    Int64 num_runs = chunks_fit<N>(delta) && chunks_fit<N>(grad) ? size / N : 0;
    for (Int64 run = first_item(); run < num_runs; run += num_threads()) {
        float d[N], g[N];
        load_run<N>(d, delta + run * N);
        load_run<N>(g, grad + run * N);
        UNROLL for (int k = 0; k < N; ++k) d[k] = free_step_of(d[k], g[k], step, eps);
        store_run<N>(delta + run * N, d);
    }
    for (Int64 i = num_runs * N + first_item(); i < size; i += num_threads()) {
        delta[i] = free_step_of(delta[i], grad[i], step, eps);
    }
}
