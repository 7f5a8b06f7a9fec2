// Draw the attack's starting point: noise around x, or x itself for the whole batch. STATE: float or Byte.
// The counters are read from device memory if `counters` is not null, so that a captured graph draws anew.
#include "draws.cuh"
#include "linf.cuh"

HOST_DEVICE float start_of(float x, UInt64 bits, float eps, bool moves) {
    float noise = uniform(bits) * 2.0f - 1.0f;
    return clip_to_ball(x + noise * (moves ? eps : 0.0f), x, eps);
}

HOST_DEVICE Byte start_of(Byte x, UInt64 bits, int eps, bool moves) {
    int offset = moves ? below(bits, 2 * eps + 1) - eps : 0;
    return Byte(at_most(at_least(int(x) + offset, 0), 255));
}

// Images are dense, channels last or first; the element counter is the logical (channel, pixel) position.
extern "C" __global__ void draw_start(
    STATE* out, const STATE* x, const Int64* index, const Int64* counters, Int64 seed, Int64 epoch, Int64 step,
    Pixel<STATE>::Distance eps, float clean_prob, Int64 size, Int64 channels, Int64 pixels, int channels_last
) {
    constexpr int N = vector_width<float>();
    Counters at = counters ? Counters{counters[0], counters[1], counters[2]} : Counters{seed, epoch, step};
    UInt64 clean_key = absorb(step_key(STREAM_CLEAN_START, at), 0);
    bool moves = uniform(draw_bits(clean_key, 0)) >= clean_prob;
    UInt64 key = step_key(STREAM_START, at);
    Int64 row_size = channels * pixels;

    // A run must not leave its row: then one row key and one pair of divisions serve all its elements.
    bool fit = chunks_fit<N>(out) && chunks_fit<N>(x) && row_size % N == 0;
    Int64 num_runs = fit ? size / N : 0;
    for (Int64 run = first_item(); run < num_runs; run += num_threads()) {
        Int64 row = run * N / row_size, position = run * N % row_size;
        UInt64 row_key = absorb(key, UInt64(index[row]));
        Int64 pixel = channels_last ? position / channels : 0, channel = position - pixel * channels;
        STATE pixels_in[N], pixels_out[N];
        load_run<N>(pixels_in, x + run * N);
        UNROLL for (int k = 0; k < N; ++k) {
            Int64 element = channels_last ? channel * pixels + pixel : position + k;
            pixels_out[k] = start_of(pixels_in[k], draw_bits(row_key, UInt64(element)), eps, moves);
            if (++channel == channels) channel = 0, ++pixel;
        }
        store_run<N>(out + run * N, pixels_out);
    }
    for (Int64 i = num_runs * N + first_item(); i < size; i += num_threads()) {
        Int64 row = i / row_size, position = i % row_size;
        Int64 element = channels_last ? position % channels * pixels + position / channels : position;
        out[i] = start_of(x[i], draw_bits(absorb(key, UInt64(index[row])), UInt64(element)), eps, moves);
    }
}
