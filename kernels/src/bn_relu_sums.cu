// Per channel, of the gradient through the ReLU: its sum, and the sum of its products with x - mean.
// VALUE: float, Half or BFloat16.
//
// Every thread sums its slice into a row of `partial`; bn_relu_fold then adds those rows up. No atomics: the order is
// fixed, and with it the result.
#include "bn_relu.cuh"

template <int N>
HOST_DEVICE void sum_rows(
    float* partial, const VALUE* grad, const VALUE* out, const VALUE* x, const float* mean, Rows rows
) {
    for (Int64 item = first_item(); item < rows.items<N>(); item += num_threads()) {
        Int64 channel = rows.channel<N>(item), slice = rows.slice<N>(item);
        float centre[N], sum[N], product[N];
        UNROLL for (int k = 0; k < N; ++k) centre[k] = mean[channel + k], sum[k] = product[k] = 0.0f;
        for (Int64 row = slice; row < rows.count; row += rows.slices) {
            Int64 at = row * rows.channels + channel;
            VALUE g[N], o[N], value[N];
            load_run<N>(g, grad + at);
            load_run<N>(o, out + at);
            load_run<N>(value, x + at);
            UNROLL for (int k = 0; k < N; ++k) {
                float d = drelu(to_float(g[k]), to_float(o[k]));
                sum[k] += d;
                product[k] += d * (to_float(value[k]) - centre[k]);
            }
        }
        float* to = partial + slice * 2 * rows.channels + channel;
        UNROLL for (int k = 0; k < N; ++k) to[k] = sum[k], to[rows.channels + k] = product[k];
    }
}

extern "C" __global__ void bn_relu_sums(
    float* partial, const VALUE* grad, const VALUE* out, const VALUE* x, const float* mean, Int64 count,
    Int64 channels, Int64 slices
) {
    constexpr int N = vector_width<VALUE>();
    Rows rows{count, channels, slices};
    if (rows.divide<N>() && chunks_fit<N>(grad) && chunks_fit<N>(out) && chunks_fit<N>(x)) {
        sum_rows<N>(partial, grad, out, x, mean, rows);
    } else {
        sum_rows<1>(partial, grad, out, x, mean, rows);
    }
}

// Add up `count` rows of `width` numbers, `each` at a time: row g of `to` is the sum of rows g * each and on.
extern "C" __global__ void bn_relu_fold(float* to, const float* from, Int64 width, Int64 count, Int64 each) {
    for (Int64 item = first_item(); item < (count + each - 1) / each * width; item += num_threads()) {
        Int64 column = item % width, first = item / width * each;
        Int64 end = first + each < count ? first + each : count;
        float sum = 0.0f;
        for (Int64 row = first; row < end; ++row) sum += from[row * width + column];
        to[item] = sum;
    }
}
