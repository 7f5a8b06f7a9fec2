// Write rows into the ring at *ptr, then advance it. FEATURE, FEAT: float, Half or BFloat16.
//
// Two kernels, launched one after the other: inside one, a block could advance the cursor before another has read it.
// Element by element: a batch is some tens of kilobytes, and the launch costs more than the copy.
#include "common.cuh"

// The remainder with the sign of the divisor, as in Python and torch.
HOST_DEVICE Int64 modulo(Int64 value, Int64 size) {
    Int64 rest = value % size;
    return rest < 0 ? rest + size : rest;
}

// Only rows from `skipped` on are written: a one-by-one writer would have overwritten those before.
extern "C" __global__ void bank_write(
    FEATURE* features, Int64* index, const Int64* ptr, const FEAT* feat, const Int64* feat_index,
    Int64 size, Int64 dim, Int64 rows, Int64 skipped
) {
    Int64 start = *ptr;
    for (Int64 i = skipped * dim + first_item(); i < rows * dim; i += num_threads()) {
        Int64 row = i / dim, column = i % dim, slot = modulo(start + row, size);
        features[slot * dim + column] = from_float<FEATURE>(to_float(feat[i]));
        if (column == 0) index[slot] = feat_index[row];
    }
}

extern "C" __global__ void bank_advance(Int64* ptr, Int64 size, Int64 rows) {
    if (first_item() == 0) *ptr = modulo(*ptr + rows, size);
}
