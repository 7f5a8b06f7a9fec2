// Backward of relu(batch_norm(x) + other), given the sums of bn_relu_sums: dx, and the gradient of `other`, which is
// the masked one; its pointer may be null. VALUE: float, Half or BFloat16.
#include "bn_relu.cuh"

template <int N>
HOST_DEVICE void grad_rows(
    VALUE* dx, VALUE* dother, const VALUE* grad, const VALUE* out, const VALUE* x, const float* mean,
    const float* invstd, const float* weight, const float* sums, Rows rows
) {
    float number = float(rows.count);
    for (Int64 item = first_item(); item < rows.items<N>(); item += num_threads()) {
        Int64 channel = rows.channel<N>(item);
        float centre[N], scale[N], level[N], slope[N];
        UNROLL for (int k = 0; k < N; ++k) {
            float inverse = invstd[channel + k];
            centre[k] = mean[channel + k];
            scale[k] = weight[channel + k] * inverse;
            level[k] = sums[channel + k] / number;
            slope[k] = sums[rows.channels + channel + k] * inverse * inverse / number;
        }
        for (Int64 row = rows.slice<N>(item); row < rows.count; row += rows.slices) {
            Int64 at = row * rows.channels + channel;
            VALUE g[N], o[N], value[N];
            load_run<N>(g, grad + at);
            load_run<N>(o, out + at);
            load_run<N>(value, x + at);
            UNROLL for (int k = 0; k < N; ++k) {
                float d = drelu(to_float(g[k]), to_float(o[k]));
                g[k] = from_float<VALUE>(d);
                value[k] = from_float<VALUE>((d - level[k] - (to_float(value[k]) - centre[k]) * slope[k]) * scale[k]);
            }
            store_run<N>(dx + at, value);
            if (dother) store_run<N>(dother + at, g);
        }
    }
}

extern "C" __global__ void bn_relu_grad(
    VALUE* dx, VALUE* dother, const VALUE* grad, const VALUE* out, const VALUE* x, const float* mean,
    const float* invstd, const float* weight, const float* sums, Int64 count, Int64 channels, Int64 slices
) {
    constexpr int N = vector_width<VALUE>();
    Rows rows{count, channels, slices};
    bool fit = chunks_fit<N>(dx) && chunks_fit<N>(dother) && chunks_fit<N>(grad);
    if (rows.divide<N>() && fit && chunks_fit<N>(out) && chunks_fit<N>(x)) {
        grad_rows<N>(dx, dother, grad, out, x, mean, invstd, weight, sums, rows);
    } else {
        grad_rows<1>(dx, dother, grad, out, x, mean, invstd, weight, sums, rows);
    }
}
