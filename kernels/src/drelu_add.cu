// Backward of relu(a + b), in place: grad = (grad + other) where the ReLU's output is positive, else 0.
// VALUE: float, Half or BFloat16; `other` may be null. As in torch's threshold_backward the test is out <= 0, so a NaN
// in the output lets the gradient through, and a NaN gradient is 0 where the output is not positive.
#include "common.cuh"

template <class T>
HOST_DEVICE T masked(T grad, T out) {
    return to_float(out) <= 0.0f ? from_float<T>(0.0f) : grad;
}

template <class T>
HOST_DEVICE T sum_of(T grad, T other) {
    return from_float<T>(to_float(grad) + to_float(other));
}

extern "C" __global__ void drelu_add(VALUE* grad, const VALUE* other, const VALUE* out, Int64 size) {
    constexpr int N = vector_width<VALUE>();
    bool fit = chunks_fit<N>(grad) && chunks_fit<N>(other) && chunks_fit<N>(out);
    Int64 num_runs = fit ? size / N : 0;
    for (Int64 run = first_item(); run < num_runs; run += num_threads()) {
        VALUE g[N], o[N];
        load_run<N>(g, grad + run * N);
        load_run<N>(o, out + run * N);
        if (other) {
            VALUE h[N];
            load_run<N>(h, other + run * N);
            UNROLL for (int k = 0; k < N; ++k) g[k] = sum_of(g[k], h[k]);
        }
        UNROLL for (int k = 0; k < N; ++k) g[k] = masked(g[k], o[k]);
        store_run<N>(grad + run * N, g);
    }
    for (Int64 i = num_runs * N + first_item(); i < size; i += num_threads()) {
        grad[i] = masked(other ? sum_of(grad[i], other[i]) : grad[i], out[i]);
    }
}
