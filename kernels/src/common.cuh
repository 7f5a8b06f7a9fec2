// Types, conversions, grid indices and vector access that every kernel uses.
//
// No CUDA header is included: NVRTC needs nothing beside these files, and a host compiler takes them as they are,
// so the tests run the very same loops on the CPU. Elementwise arithmetic is compiled without fused multiply-add on
// both sides; then both round alike.
#pragma once

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define MAY_ALIAS
#else
#include <cstring>
#define HOST_DEVICE inline
#define __global__
#define UNROLL
#define MAY_ALIAS [[gnu::may_alias]]
#endif

using Byte = unsigned char;
using Int64 = long long;
using UInt64 = unsigned long long;

struct Half {
    unsigned short bits;
};

struct BFloat16 {
    unsigned short bits;
};

// ---- conversions -----------------------------------------------------------------------------------------------

union FloatBits {
    float value;
    unsigned bits;
};

HOST_DEVICE float to_float(float x) { return x; }

HOST_DEVICE float to_float(Half x) {
#ifdef __CUDA_ARCH__
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
    return value;
#elif defined(__CUDACC__)
    return 0.0f;  // the host pass of a CUDA compiler; never run
#else
    _Float16 value;
    std::memcpy(&value, &x.bits, 2);
    return float(value);
#endif
}

HOST_DEVICE float to_float(BFloat16 x) {
    FloatBits word;
    word.bits = unsigned(x.bits) << 16;
    return word.value;
}

// Round to nearest, ties to even, as torch does; a NaN stays a NaN.
template <class T>
HOST_DEVICE T from_float(float x);

template <>
HOST_DEVICE float from_float<float>(float x) {
    return x;
}

template <>
HOST_DEVICE Half from_float<Half>(float x) {
    Half result{0};
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
#elif !defined(__CUDACC__)
    _Float16 value = _Float16(x);
    std::memcpy(&result.bits, &value, 2);
#endif
    return result;
}

// In integers, because sm_70 has no such instruction.
template <>
HOST_DEVICE BFloat16 from_float<BFloat16>(float x) {
    FloatBits word;
    word.value = x;
    if (x != x) return BFloat16{0x7FC0};
    return BFloat16{static_cast<unsigned short>((word.bits + 0x7FFF + ((word.bits >> 16) & 1)) >> 16)};
}

// ---- which part of the work is this thread's --------------------------------------------------------------------

#ifdef __CUDACC__
__device__ __forceinline__ Int64 first_item() { return Int64(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ Int64 num_threads() { return Int64(gridDim.x) * blockDim.x; }
#else
inline thread_local Int64 host_thread = 0, host_num_threads = 1;
inline Int64 first_item() { return host_thread; }
inline Int64 num_threads() { return host_num_threads; }
#endif

// ---- several elements per memory instruction --------------------------------------------------------------------

template <int BYTES>
struct Chunk;
template <>
struct alignas(16) MAY_ALIAS Chunk<16> {
    unsigned words[4];
};
template <>
struct alignas(8) MAY_ALIAS Chunk<8> {
    unsigned words[2];
};
template <>
struct alignas(4) MAY_ALIAS Chunk<4> {
    unsigned words[1];
};
template <>
struct alignas(2) MAY_ALIAS Chunk<2> {
    unsigned short words[1];
};

// The widest chunk, of at most 16 bytes, that a run of this many bytes is a whole number of.
HOST_DEVICE constexpr int chunk_bytes(int bytes) {
    return bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : bytes % 4 == 0 ? 4 : 2;
}

// How many elements of the widest of these types fill 16 bytes.
template <class... T>
HOST_DEVICE constexpr int vector_width() {
    int widest = 1;
    ((widest = int(sizeof(T)) > widest ? int(sizeof(T)) : widest), ...);
    return 16 / widest;
}

// Whether a run of N elements from here, and each run after it, may be read in chunks. A null pointer may.
template <int N, class T>
HOST_DEVICE bool chunks_fit(const T* address) {
    return reinterpret_cast<unsigned long long>(address) % chunk_bytes(N * int(sizeof(T))) == 0;
}

template <int N, class T>
HOST_DEVICE void load_run(T* to, const T* from) {
    constexpr int bytes = chunk_bytes(N * int(sizeof(T)));
    UNROLL for (int k = 0; k < N * int(sizeof(T)) / bytes; ++k) {
        Chunk<bytes> chunk = reinterpret_cast<const Chunk<bytes>*>(from)[k];
        memcpy(reinterpret_cast<char*>(to) + k * bytes, &chunk, bytes);
    }
}

template <int N, class T>
HOST_DEVICE void store_run(T* to, const T* from) {
    constexpr int bytes = chunk_bytes(N * int(sizeof(T)));
    UNROLL for (int k = 0; k < N * int(sizeof(T)) / bytes; ++k) {
        Chunk<bytes> chunk;
        memcpy(&chunk, reinterpret_cast<const char*>(from) + k * bytes, bytes);
        reinterpret_cast<Chunk<bytes>*>(to)[k] = chunk;
    }
}
