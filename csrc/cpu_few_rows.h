// A few rows of x times a weight as it is, for csrc/cpu_linear.cpp.
//
// Reading the weight is the work then. SQUARE of its rows at a time are read from their first term to their last and
// transposed in registers; meanwhile the next ones are prefetched, in the order of memory, in which a CPU reads fastest.
// Each sum is what panels make it, to the bit (but for those of a NaN): a row of x does not depend on how many others there
// are.
#ifndef CLIPFAST_CPU_FEW_ROWS_H
#define CLIPFAST_CPU_FEW_ROWS_H

#include "cpu_panels.h"

namespace {

// Rows, at most: their sums are in registers together.
constexpr int64_t FEW = 8;

// Is this faster than panels? Times as fast, for 1, 4 and 8 rows of the blocks of ViT-B/32 and L/14, two threads of an AMD
// EPYC (Zen 4, 2026-11-30): float32 1.2 to 1.3, 1.1 to 1.3, 1.0 to 1.1; bfloat16 held to AVX2 1.2, 1.1, 1.1, with AVX-512
// 1.0, 1.0, 0.95. Sixteen rows, eight at a time: 0.8.
template <typename T>
constexpr bool SERVES_FEW = sizeof(T) == 4 || LANES < 16;

// Rows, at most, for which two strips are read side by side: with one alone the sums wait for each other. Times as fast, for
// 1, 2 and 3 rows, two threads of an AMD EPYC (Zen 4) held to AVX2, 2026-12-01: bfloat16 of ViT-B/32 1.3, 1.3, 1.2, of L/14
// 1.2, 1.1, 1.0; float32 of B/32 0.9, of L/14 0.7, since rows that are 4096 bytes apart meet in one set of the first cache.
template <typename T>
constexpr int FEWEST = sizeof(T) == 4 ? 0 : 3;

// a register of SQUARE columns
typedef float Columns __attribute__((vector_size(4 * SQUARE)));

// Rows of the weight over a chain of terms, `stride` bytes apart. `rows` are left, of which a strip is SQUARE at most.
// bytes: of each row in memory.   words: the same, filled up with zeros.   ahead: what is prefetched meanwhile, as many
// bytes as are read; it may reach past the end of the weight, where a prefetch does no harm
struct Strip {
    const char *weight;
    int64_t stride, rows, bytes, words;
    const char *ahead;
};

// to[R][S * SQUARE] = (or +=) R rows of x, CHAIN apart, times S strips that are neighbours
template <typename T, int R, int S>
__attribute__((noinline)) void multiply_strips(const uint32_t *x, const Strip &strip, float *to, int64_t to_stride,
                                               bool add) {
    constexpr int EACH = STEPS<T>; // of a word: float32, or bfloat16 that is widened
    // Bytes that are read, and prefetched, each time. 8 rows are 1.04 to 1.08 times as fast as when lines were counted row by
    // row, as panels do it (AMD EPYC, Zen 4, held to AVX2, 2026-12-01).
    constexpr int64_t READ = S * SQUARE * 16;
    Columns sums[R][S] = {};
    const auto multiply = [&](const char *from, int64_t stride, const uint32_t *row) __attribute__((always_inline)) {
        Row words[S][4];
#pragma GCC unroll 2
        for (int s = 0; s < S; s++) turn_four(from + s * SQUARE * stride, stride, words[s]);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
#pragma GCC unroll 2
            for (int j = 0; j < EACH; j++)
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    const Columns term = (Columns)(Row{} + row[r * CHAIN + EACH * i + j]);
#pragma GCC unroll 2
                    for (int s = 0; s < S; s++) {
                        const Row word = words[s][i], step = EACH == 1 ? word : j == 0 ? word << 16 : word & 0xffff0000u;
                        sums[r][s] += term * (Columns)step;
                    }
                }
    };
    const int64_t whole = strip.rows >= S * SQUARE ? strip.bytes / 16 * 4 : 0;
    for (int64_t word = 0; word < whole; word += 4) {
        for (int64_t i = 0; i < READ; i += LINE) __builtin_prefetch(strip.ahead + word / 4 * READ + i, 0, 2);
        multiply(strip.weight + 4 * word, strip.stride, x + EACH * word);
    }
    for (int64_t word = whole; word < strip.words; word += 4) {
        char some[S * SQUARE][16] = {};
        const int64_t left = least(strip.bytes - 4 * word, 16);
        for (int64_t i = 0; i < least(strip.rows, S * SQUARE) && left > 0; i++)
            memcpy(some[i], strip.weight + i * strip.stride + 4 * word, left);
        multiply(some[0], 16, x + EACH * word);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int s = 0; s < S; s++) {
            float *const place = to + r * to_stride + s * SQUARE;
            Columns sum = {};
            if (add) memcpy(&sum, place, sizeof sum);
            sum = add ? sum + sums[r][s] : sums[r][s];
            memcpy(place, &sum, sizeof sum);
        }
}

// for `count` rows of x
template <typename T, int S, int R = S == 1 ? int(FEW) : FEWEST<T>, typename... Rest>
inline void multiply_strips_by(int64_t count, Rest &&...rest) {
    if constexpr (R > 1)
        if (count < R) return multiply_strips_by<T, S, R - 1>(count, rest...);
    return multiply_strips<T, R, S>(rest...);
}

} // namespace

#endif
