// The counter-based draws of kernels/draws.py: SplitMix64 outputs from a hashed key per row.
#pragma once
#include "common.cuh"

constexpr UInt64 STREAM_START = 0x5354, STREAM_CLEAN_START = 0x4353;
constexpr UInt64 GOLDEN = 0x9E3779B97F4A7C15;

HOST_DEVICE UInt64 mix64(UInt64 z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
}

HOST_DEVICE UInt64 absorb(UInt64 key, UInt64 word) { return mix64((key ^ word) + GOLDEN); }

struct Counters {
    Int64 seed, epoch, step;
};

// The part of a row's key that all rows share; absorb(step_key(...), index) is the row's.
HOST_DEVICE UInt64 step_key(UInt64 stream, Counters at) {
    return absorb(absorb(absorb(absorb(0, stream), UInt64(at.seed)), UInt64(at.epoch)), UInt64(at.step));
}

HOST_DEVICE UInt64 draw_bits(UInt64 row_key, UInt64 element) { return mix64(row_key + (element + 1) * GOLDEN); }

// The top 24 bits: every value is exact in float32.
HOST_DEVICE float uniform(UInt64 bits) { return float(unsigned(bits >> 40)) * 0x1p-24f; }

// An integer of 0 .. count-1 from the top 32 bits; each has its share but for less than 2**-32.
HOST_DEVICE int below(UInt64 bits, int count) { return int(((bits >> 32) * UInt64(count)) >> 32); }
