// 8-bit pixels to [0, 1]. OUT: float, Half or BFloat16.
#include "linf.cuh"

extern "C" __global__ void u8_to_input(OUT* out, const Byte* x, Int64 size) {
    constexpr int N = vector_width<OUT>();
    Int64 num_runs = chunks_fit<N>(out) && chunks_fit<N>(x) ? size / N : 0;
    for (Int64 run = first_item(); run < num_runs; run += num_threads()) {
        Byte pixel[N];
        OUT value[N];
        load_run<N>(pixel, x + run * N);
        UNROLL for (int k = 0; k < N; ++k) value[k] = from_float<OUT>(Pixel<Byte>::value(pixel[k]));
        store_run<N>(out + run * N, value);
    }
    for (Int64 i = num_runs * N + first_item(); i < size; i += num_threads()) {
        out[i] = from_float<OUT>(Pixel<Byte>::value(x[i]));
    }
}
