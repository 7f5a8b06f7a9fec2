// Batch norm with what follows it in a residual network, over channels-last tensors: rows of channels.
//
// A thread takes N neighbouring channels of every `slices`-th row, so that what belongs to a channel is read once and
// neighbouring threads read neighbouring memory. Statistics and parameters are float32.
#pragma once
#include "common.cuh"

struct Rows {
    Int64 count, channels, slices;

    template <int N>
    HOST_DEVICE Int64 items() const { return channels / N * slices; }
    template <int N>
    HOST_DEVICE Int64 channel(Int64 item) const { return item % (channels / N) * N; }
    template <int N>
    HOST_DEVICE Int64 slice(Int64 item) const { return item / (channels / N); }
    // Whether the channels are whole runs of N, so that each run of a row starts as aligned as the tensor.
    template <int N>
    HOST_DEVICE bool divide() const { return channels % N == 0; }
};

// As in torch, a NaN stays one.
HOST_DEVICE float relu(float value) { return value < 0.0f ? 0.0f : value; }

// As in torch's threshold_backward the test is out <= 0.
HOST_DEVICE float drelu(float grad, float out) { return out <= 0.0f ? 0.0f : grad; }
