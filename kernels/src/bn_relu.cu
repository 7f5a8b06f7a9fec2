// out = relu((x - mean) * (weight * invstd) + bias + other); `other` may be null. VALUE: float, Half or BFloat16.
#include "bn_relu.cuh"

template <int N>
HOST_DEVICE void normalize_rows(
    VALUE* out, const VALUE* x, const VALUE* other, const float* mean, const float* invstd, const float* weight,
    const float* bias, Rows rows
) {
    for (Int64 item = first_item(); item < rows.items<N>(); item += num_threads()) {
        Int64 channel = rows.channel<N>(item);
        float centre[N], scale[N], shift[N];
        UNROLL for (int k = 0; k < N; ++k) {
            centre[k] = mean[channel + k];
            scale[k] = weight[channel + k] * invstd[channel + k];
            shift[k] = bias[channel + k];
        }
        for (Int64 row = rows.slice<N>(item); row < rows.count; row += rows.slices) {
            Int64 at = row * rows.channels + channel;
            VALUE value[N];
            load_run<N>(value, x + at);
            float sum[N];
            UNROLL for (int k = 0; k < N; ++k) sum[k] = (to_float(value[k]) - centre[k]) * scale[k] + shift[k];
            if (other) {
                VALUE added[N];
                load_run<N>(added, other + at);
                UNROLL for (int k = 0; k < N; ++k) sum[k] += to_float(added[k]);
            }
            UNROLL for (int k = 0; k < N; ++k) value[k] = from_float<VALUE>(relu(sum[k]));
            store_run<N>(out + at, value);
        }
    }
}

extern "C" __global__ void bn_relu(
    VALUE* out, const VALUE* x, const VALUE* other, const float* mean, const float* invstd, const float* weight,
    const float* bias, Int64 count, Int64 channels, Int64 slices
) {
    constexpr int N = vector_width<VALUE>();
    Rows rows{count, channels, slices};
    if (rows.divide<N>() && chunks_fit<N>(out) && chunks_fit<N>(x) && chunks_fit<N>(other)) {
        normalize_rows<N>(out, x, other, mean, invstd, weight, bias, rows);
    } else {
        normalize_rows<1>(out, x, other, mean, invstd, weight, bias, rows);
    }
}
