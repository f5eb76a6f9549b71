// Which block, lane and step of the patch embedding touches what: pure functions, the same on device and host.

#pragma once

#include "clipfast.h"
#include "executor.cuh"

namespace clipfast {

constexpr int CHANNELS = 3;

// The arguments, and what follows from them.
struct Problem : clipfast_patch_embed_args {
    int64_t across;  // patches in a row of the grid
    int64_t length;  // L, tokens of an image
    int64_t rows;    // B * L
};

// M x N: tokens x features of a block; K: terms in a buffer; WARPS_M x WARPS_N warps share the tile.
template <int M_, int N_, int K_, int WARPS_M, int WARPS_N_, bool WHOLE_ROWS_> struct Tile {
    static constexpr int M = M_, N = N_, K = K_, WARPS_N = WARPS_N_;
    static constexpr bool WHOLE_ROWS = WHOLE_ROWS_;
    static constexpr int THREADS = WARPS_M * WARPS_N * LANES;
    static constexpr int M_TILES = M / WARPS_M / 16, N_TILES = N / WARPS_N / 8;  // m16n8 products of a warp
    static_assert(M % (16 * WARPS_M) == 0 && N % (16 * WARPS_N) == 0 && K % 16 == 0, "whole m16n8k16, n in pairs");

    static CLIPFAST_HD int first_row(int warp) { return warp / WARPS_N * (M_TILES * 16); }
    static CLIPFAST_HD int first_column(int warp) { return warp % WARPS_N * (N_TILES * 8); }
};

// Which of the threads moves what: item i of a thread, of rows of PER_ROW items. Written as a start and a stride, in
// unsigned numbers, so that a thread's items are at constant distances and share one address register.
template <int PER_ROW, int THREADS> struct Share {
    static_assert(THREADS % PER_ROW == 0, "a thread keeps its column");

    static CLIPFAST_HD int row(unsigned thread, int i) { return thread / PER_ROW + i * (THREADS / PER_ROW); }
    static CLIPFAST_HD int column(unsigned thread) { return thread % PER_ROW; }
};

// How the pixels and the weight of one P are cut into what a lane moves at once: no group crosses a row of pixels (so 2
// pixels where P = 14), no copy crosses the end of K, and each is aligned to its size in shared memory.
template <int P, class Tile> struct Cut {
    static constexpr int K = CHANNELS * P * P;
    static constexpr int CHUNKS = (K + Tile::K - 1) / Tile::K;
    static constexpr int GROUP = P % 8 == 0 ? 8 : 2;  // pixels
    static constexpr int COPY = K % 8 == 0 ? 8 : 4;   // terms of the weight
    using Groups = Share<Tile::K / GROUP, Tile::THREADS>;
    using Copies = Share<Tile::K / COPY, Tile::THREADS>;
    static constexpr int GROUPS_PER_LANE = (Tile::M * Tile::K / GROUP + Tile::THREADS - 1) / Tile::THREADS;
    static constexpr int COPIES_PER_LANE = Tile::N * Tile::K / COPY / Tile::THREADS;
    // whether the last of a lane's groups may lie past the tile
    static constexpr bool RAGGED = Tile::M * Tile::K / GROUP % Tile::THREADS != 0;
    static_assert(P % GROUP == 0 && K % COPY == 0 && Tile::K % 8 == 0, "groups and copies are whole");
    static_assert(Tile::N * Tile::K / COPY % Tile::THREADS == 0, "every lane has as many copies");
};

// Where term k of a row lies in a buffer of rows of K terms. The 16-byte units of a row are permuted so that the eight
// rows that ldmatrix reads together fall into different banks.
template <int K> CLIPFAST_HD int shared_offset(unsigned row, unsigned k) {
    constexpr unsigned UNITS = K / 8;
    static_assert(UNITS == 2 || UNITS == 4 || UNITS == 8, "a row is a power of two of units, at most 128 bytes");
    return row * K + ((k / 8) ^ (row / (8 / UNITS) % UNITS)) * 8 + k % 8;
}

// The row that a lane addresses for ldmatrix: matrices in the order of the registers of mma's A and of two of its B.
CLIPFAST_HD int a_row(int lane) { return lane % 16; }
CLIPFAST_HD int a_term(int lane) { return lane / 16 * 8; }
CLIPFAST_HD int b_row(int lane) { return lane % 8 + lane / 16 * 8; }
CLIPFAST_HD int b_term(int lane) { return lane / 8 % 2 * 8; }

// Row and column, within an m16n8 product, of a lane's sums 2 half and 2 half + 1.
CLIPFAST_HD int sum_row(int lane, int half) { return lane / 4 + 8 * half; }
CLIPFAST_HD int sum_column(int lane) { return lane % 4 * 2; }

// Term k of a flattened patch, counted in pixels from the first pixel of the patch.
template <class Int> CLIPFAST_HD int64_t pixel_offset(const Problem &p, Int k, Int patch) {
    return k / (patch * patch) * p.stride_channel + k / patch % patch * p.stride_row + k % patch;
}

// What a block needs to know of its tokens.
template <int M> struct Rows {
    int64_t patch[M];  // offset of the first pixel; -1 for a class token and past the last token
    int token[M];      // which token of its image; -1 past the last token

    // i: in the tile, whose first row is token first % L of image first / L.
    CLIPFAST_HD void describe(const Problem &p, int64_t first, int i) {
        // one division in 64 bits for the tile, the same for all lanes; in 32 bits for each row
        const int length = static_cast<int>(p.length), across = static_cast<int>(p.across);
        const int64_t first_image = first / length;
        const unsigned place = static_cast<unsigned>(first - first_image * length) + i;
        const int in_image = static_cast<int>(place % length);
        token[i] = first + i < p.rows ? in_image : -1;
        patch[i] = -1;
        if (token[i] <= 0) return;
        const int64_t image = first_image + place / length, y = (in_image - 1) / across, x = (in_image - 1) % across;
        patch[i] = image * p.stride_batch + y * p.patch * p.stride_row + x * p.patch;
    }
};

// A token before ln_pre.
CLIPFAST_HD float token_value(const Problem &p, float sum, int token, int64_t feature) {
    return (token == 0 ? p.class_embedding[feature] : sum) + p.positional_embedding[token * p.features + feature];
}

// Pixels are uint8, float32 or the weight's dtype.
template <class T, class F> CLIPFAST_HD void with_pixel_type(int dtype, F f) {
    if (dtype == CLIPFAST_UINT8) return f(uint8_t{});
    if (dtype == CLIPFAST_FLOAT32) return f(float{});
    f(T{});
}

// COUNT pixels as they are in memory, at a multiple of their size (or of 16 bytes).
template <class Pixel, int COUNT> CLIPFAST_HD void read_pixels(const Pixel *from, uint32_t (&words)[COUNT]) {
    constexpr int BYTES = COUNT * sizeof(Pixel);
    if constexpr (BYTES == 2) {
        words[0] = *reinterpret_cast<const uint16_t *>(from);
    } else if constexpr (BYTES == 4) {
        words[0] = *reinterpret_cast<const uint32_t *>(from);
    } else if constexpr (BYTES == 8) {
        const uint2 read = *reinterpret_cast<const uint2 *>(from);
        words[0] = read.x, words[1] = read.y;
    } else {
        for (int i = 0; i < BYTES / 16; ++i) {
            const uint4 read = reinterpret_cast<const uint4 *>(from)[i];
            words[4 * i] = read.x, words[4 * i + 1] = read.y, words[4 * i + 2] = read.z, words[4 * i + 3] = read.w;
        }
    }
}

template <class Pixel, int COUNT> CLIPFAST_HD float pixel(const uint32_t (&words)[COUNT], int i) {
    if constexpr (sizeof(Pixel) == 1) return static_cast<float>(words[i / 4] >> (8 * (i % 4)) & 0xff);
    if constexpr (sizeof(Pixel) == 2) return unpack<Pixel>(words[i / 2], i % 2);
    if constexpr (sizeof(Pixel) == 4) return bit_cast<float>(words[i]);
}

}  // namespace clipfast
