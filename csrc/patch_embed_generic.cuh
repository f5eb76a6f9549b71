// Patch embedding for every size and dtype, float32 multiply-adds only: patches that are not 14, 16 or 32, odd widths,
// float32 weights, any number of channels. 64 x 64 of the output a block, 4 x 4 a thread. Not yet run on a GPU.

#pragma once

#include "patch_embed.cuh"

namespace clipfast {

struct GenericRegisters {
    static constexpr int COPIES = 1;
    float sums[4][4];
};

struct GenericShared {
    // rows of 65: a warp writes along k and reads along the rows, both without bank conflicts
    float pixels[16][65], weight[16][65];
    Rows<64> rows;
};

template <class T> struct GenericPatchEmbed {
    static constexpr int M = 64, N = 64, K = 16, THREADS = 256, MIN_BLOCKS = 2;
    using Registers = GenericRegisters;
    using SharedMemory = GenericShared;

    // Term k of a patch, normalised as PyTorch does it, then rounded to the weight's dtype.
    static CLIPFAST_HD float term(const Problem &p, int64_t patch, int64_t k) {
        const int64_t place = patch + pixel_offset(p, k, p.patch), channel = k / (p.patch * p.patch);
        float value;
        if (p.image_dtype == CLIPFAST_UINT8)
            value = (static_cast<const uint8_t *>(p.images)[place] / 255.0f - p.mean[channel]) / p.std[channel];
        else if (p.image_dtype == CLIPFAST_FLOAT16)
            value = to_float(static_cast<const __half *>(p.images)[place]);
        else if (p.image_dtype == CLIPFAST_BFLOAT16)
            value = to_float(static_cast<const __nv_bfloat16 *>(p.images)[place]);
        else
            value = static_cast<const float *>(p.images)[place];
        return to_float(from_float<T>(value));
    }

    static CLIPFAST_HD void load(const Problem &p, SharedMemory &shared, int64_t first_column, int64_t first_term,
                                 int64_t terms, int thread) {
        for (int i = thread; i < M * K; i += THREADS) {
            const int row = i / K, k = i % K;
            const int64_t patch = shared.rows.patch[row], column = first_column + row;
            const bool inside = first_term + k < terms;
            shared.pixels[k][row] = inside && patch >= 0 ? term(p, patch, first_term + k) : 0.0f;
            const T *weight = static_cast<const T *>(p.weight) + column * terms + first_term + k;
            shared.weight[k][row] = inside && column < p.features ? to_float(*weight) : 0.0f;
        }
    }

    static CLIPFAST_HD void multiply(const SharedMemory &shared, int thread, Registers &r) {
        // a sum of its own for each chunk: one chain over 3,072 terms rounds several times as much as a BLAS
        float sums[4][4] = {};
        CLIPFAST_UNROLL
        for (int k = 0; k < K; ++k)
            CLIPFAST_UNROLL
            for (int m = 0; m < 4; ++m)
                CLIPFAST_UNROLL
                for (int n = 0; n < 4; ++n)
                    sums[m][n] = fmaf(shared.pixels[k][thread / 16 + 16 * m], shared.weight[k][thread % 16 + 16 * n],
                                      sums[m][n]);
        for (int m = 0; m < 4; ++m)
            for (int n = 0; n < 4; ++n) r.sums[m][n] += sums[m][n];
    }

    static CLIPFAST_HD void write(const Problem &p, const SharedMemory &shared, int64_t first_row, int64_t first_column,
                                  int thread, const Registers &r) {
        for (int m = 0; m < 4; ++m) {
            const int row = thread / 16 + 16 * m;
            const int token = shared.rows.token[row];
            if (token < 0) continue;
            for (int n = 0; n < 4; ++n) {
                const int64_t feature = first_column + thread % 16 + 16 * n;
                if (feature >= p.features) continue;
                T *out = static_cast<T *>(p.out) + (first_row + row) * p.features + feature;
                *out = from_float<T>(token_value(p, r.sums[m][n], token, feature));
            }
        }
    }

    template <class Block>
    static CLIPFAST_HD void run(Block &block, const Problem &p, SharedMemory &shared, int64_t index) {
        const int64_t tiles_across = (p.features + N - 1) / N, terms = p.channels * p.patch * p.patch;
        const int64_t first_row = index / tiles_across * M, first_column = index % tiles_across * N;
        block.phase([&](auto &warp) {
            warp.lanes([&](int lane, Registers &r) {
                const int thread = warp.index * LANES + lane;
                if (thread < M) shared.rows.describe(p, first_row, thread);
                for (int m = 0; m < 4; ++m)
                    for (int n = 0; n < 4; ++n) r.sums[m][n] = 0.0f;
            });
        });
        for (int64_t first_term = 0; first_term < terms; first_term += K) {
            block.phase([&](auto &warp) {
                warp.lanes([&](int lane, Registers &) {
                    load(p, shared, first_column, first_term, terms, warp.index * LANES + lane);
                });
            });
            block.phase([&](auto &warp) {
                warp.lanes([&](int lane, Registers &r) { multiply(shared, warp.index * LANES + lane, r); });
            });
        }
        block.phase([&](auto &warp) {
            warp.lanes([&](int lane, Registers &r) {
                write(p, shared, first_row, first_column, warp.index * LANES + lane, r);
            });
        });
    }
};

}  // namespace clipfast
