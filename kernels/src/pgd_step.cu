// One linf step and its projection, in place. STATE: float or Byte; GRAD: float, Half or BFloat16.
#include "linf.cuh"

extern "C" __global__ void pgd_step(
    STATE* x_adv, const GRAD* grad, const STATE* x, Pixel<STATE>::Distance eps, Pixel<STATE>::Distance alpha, Int64 size
) {
    constexpr int N = vector_width<STATE, GRAD>();
    bool fit = chunks_fit<N>(x_adv) && chunks_fit<N>(grad) && chunks_fit<N>(x);
    Int64 num_runs = fit ? size / N : 0;
    for (Int64 run = first_item(); run < num_runs; run += num_threads()) {
        STATE a[N], c[N];
        GRAD g[N];
        load_run<N>(a, x_adv + run * N);
        load_run<N>(g, grad + run * N);
        load_run<N>(c, x + run * N);
        UNROLL for (int k = 0; k < N; ++k) a[k] = Pixel<STATE>::step(a[k], to_float(g[k]), c[k], eps, alpha);
        store_run<N>(x_adv + run * N, a);
    }
    for (Int64 i = num_runs * N + first_item(); i < size; i += num_threads()) {
        x_adv[i] = Pixel<STATE>::step(x_adv[i], to_float(grad[i]), x[i], eps, alpha);
    }
}
