// The model's input in the three layouts of kernels/reference.py, written from the pixels in one pass.
//
// A thread handles one cell: four pixels, whose elements are contiguous in the laid-out tensor. PLAIN and PAD4 take
// four pixels in a row of memory; S2D takes the 2x2 square that becomes one position with twelve channels, or nothing
// for a position of the zero border. Pixels are channels last: three elements each, and element k of a cell is of
// channel k % 3 in every layout.
#pragma once
#include "linf.cuh"

enum Layout { PLAIN, PAD4, S2D };

// Zero rows and columns that S2D adds before and after, so that the 4x4 stem convolution needs no padding.
constexpr Int64 BORDER_BEFORE = 2, BORDER = 3;

struct Images {
    Int64 batch, height, width;
};

struct Normalize {
    float mean[3], std[3];

    HOST_DEVICE float operator()(float value, int channel) const { return (value - mean[channel]) / std[channel]; }
};

struct Cell {
    Int64 state[2];  // where its first and its last two pixels start
    Int64 laid;      // where its elements of the laid-out tensor start
    int pixels;      // four, or fewer at the end of the batch, or none on a border
};

template <Layout AS>
HOST_DEVICE Int64 num_cells(Images in) {
    if (AS == S2D) return in.batch * (in.height / 2 + BORDER) * (in.width / 2 + BORDER);
    return (in.batch * in.height * in.width + 3) / 4;
}

template <Layout AS>
HOST_DEVICE Cell cell_at(Int64 i, Images in) {
    Cell cell;
    if (AS == S2D) {
        Int64 rows = in.height / 2 + BORDER, columns = in.width / 2 + BORDER;
        Int64 column = i % columns - BORDER_BEFORE, line = i / columns;
        Int64 row = line % rows - BORDER_BEFORE, image = line / rows;
        bool inside = row >= 0 && row < in.height / 2 && column >= 0 && column < in.width / 2;
        cell.state[0] = ((image * in.height + 2 * row) * in.width + 2 * column) * 3;
        cell.state[1] = cell.state[0] + in.width * 3;
        cell.laid = i * 12;
        cell.pixels = inside ? 4 : 0;
    } else {
        Int64 left = in.batch * in.height * in.width - i * 4;
        cell.state[0] = i * 12;
        cell.state[1] = i * 12 + 6;
        cell.laid = i * (AS == PAD4 ? 16 : 12);
        cell.pixels = left < 4 ? int(left) : 4;
    }
    return cell;
}

template <Layout AS, class State>
struct Pixels {
    static constexpr int RUN = AS == S2D ? 6 : 12;

    HOST_DEVICE static bool fit(const State* address) { return chunks_fit<RUN>(address); }

    HOST_DEVICE static void load(State* to, const State* from, const Cell& cell, bool whole) {
        if (whole) {
            UNROLL for (int k = 0; k < 12; k += RUN) load_run<RUN>(to + k, from + cell.state[k / 6]);
        } else {
            UNROLL for (int k = 0; k < 12; ++k) {
                if (k / 3 < cell.pixels) to[k] = from[cell.state[k / 6] + k % 6];
            }
        }
    }

    HOST_DEVICE static void store(State* to, const State* from, const Cell& cell, bool whole) {
        if (whole) {
            UNROLL for (int k = 0; k < 12; k += RUN) store_run<RUN>(to + cell.state[k / 6], from + k);
        } else {
            UNROLL for (int k = 0; k < 12; ++k) {
                if (k / 3 < cell.pixels) to[cell.state[k / 6] + k % 6] = from[k];
            }
        }
    }
};

// If STEP, move x_adv by one signed step along `grad`, which is laid out like `out`; then write `out` from x_adv.
// Every element of `out` is written, the zeros too.
template <Layout AS, bool STEP, class State, class Laid>
HOST_DEVICE void step_and_lay_out(
    State* x_adv, const Laid* grad, const State* x, Laid* out, Images in, Normalize normalize,
    typename Pixel<State>::Distance eps, typename Pixel<State>::Distance alpha
) {
    using Access = Pixels<AS, State>;
    constexpr int EACH = AS == PAD4 ? 4 : 3, RUN = 4 * EACH;
    bool fit = Access::fit(x_adv) && Access::fit(x) && chunks_fit<RUN>(grad) && chunks_fit<RUN>(out);
    Int64 cells = num_cells<AS>(in);
    for (Int64 i = first_item(); i < cells; i += num_threads()) {
        Cell cell = cell_at<AS>(i, in);
        bool whole = fit && cell.pixels == 4;
        State a[12] = {};
        Laid laid[RUN];
        Access::load(a, x_adv, cell, whole);
        if (STEP) {
            State c[12] = {};
            Laid g[RUN] = {};
            Access::load(c, x, cell, whole);
            if (whole) {
                load_run<RUN>(g, grad + cell.laid);
            } else {
                UNROLL for (int k = 0; k < RUN; ++k) {
                    if (k / EACH < cell.pixels) g[k] = grad[cell.laid + k];
                }
            }
            UNROLL for (int k = 0; k < 12; ++k) {
                a[k] = Pixel<State>::step(a[k], to_float(g[k / 3 * EACH + k % 3]), c[k], eps, alpha);
            }
            Access::store(x_adv, a, cell, whole);
        }
        UNROLL for (int k = 0; k < RUN; ++k) {
            bool zero = k % EACH == 3 || cell.pixels == 0;
            float value = zero ? 0.0f : normalize(Pixel<State>::value(a[k / EACH * 3 + k % EACH % 3]), k % EACH % 3);
            laid[k] = from_float<Laid>(value);
        }
        if (fit && (whole || AS == S2D)) {
            store_run<RUN>(out + cell.laid, laid);
        } else {
            UNROLL for (int k = 0; k < RUN; ++k) {
                if (AS == S2D || k / EACH < cell.pixels) out[cell.laid + k] = laid[k];
            }
        }
    }
}
