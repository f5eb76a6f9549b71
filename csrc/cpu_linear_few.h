// A linear layer of few rows.
//
// Reading the weight is most of the work then, so it is read once, as it is. The lanes are terms: a sum is a register
// whose lanes each take every LANES-th term, and the lanes are added up at the end. Each thread makes some columns of the
// result, ACROSS at a time for all rows, while the weight's next rows are on their way from memory.
#ifndef CLIPFAST_CPU_LINEAR_FEW_H
#define CLIPFAST_CPU_LINEAR_FEW_H

#include <cstdlib>
#include <omp.h>

#include "cpu_linear.h"

namespace {

// columns and rows whose sums are in registers together
constexpr int ACROSS = 4;
template <typename T>
constexpr int DOWN = LANES < 16 ? 2 : WIDENS<T> ? 4 : 6;
constexpr int64_t GROUP = 64;         // columns that are finished together
constexpr int64_t CHAIN_BYTES = 4096; // of a row of x, before the next columns have their turn: a block of
constexpr int64_t BLOCK = 128;        // rows then stays in the cache

// parts of STEP lanes from a and b in turn: the even ones of each, or the odd ones
template <int STEP>
constexpr Places parts(int odd) {
    Places places{};
    for (int i = 0; i < LANES; i++) {
        const int part = i / STEP;
        places.of[i] = part % 2 * LANES + (part / 2 * 2 + odd) * STEP + i % STEP;
    }
    return places;
}

// parts of STEP lanes, each the sum of two neighbours, of a and b in turn
template <int STEP>
Floats halved(Floats a, Floats b) {
    static constexpr Places even = parts<STEP>(0), odd = parts<STEP>(1);
    return __builtin_shuffle(a, b, even.vector()) + __builtin_shuffle(a, b, odd.vector());
}

typedef float Four __attribute__((vector_size(4 * ACROSS)));

// the sums over the lanes of four registers
inline Four over_lanes(const Floats sums[ACROSS]) {
    constexpr int HALF = LANES / 2, QUARTER = LANES / 4;
    Floats x = halved<QUARTER>(halved<HALF>(sums[0], sums[1]), halved<HALF>(sums[2], sums[3]));
    x = across_lanes<QUARTER / 2>(x, [](Floats a, Floats b) { return a + b; });
    return Four{x[0], x[HALF], x[QUARTER], x[HALF + QUARTER]};
}

// to[R][n] = (or +=) x[R][terms] . weight[n][terms], n ACROSS or 1; rows of x and of the weight are `width` apart, those
// of `to` GROUP. Meanwhile terms [first, last) of the weight's rows from `next` on are asked for.
template <typename T, int R>
void sums_of(const T *x, const T *weight, int64_t width, float *to, int n, int64_t terms, bool add, const T *next,
             int64_t first, int64_t last) {
    constexpr int N = Terms<T>::N;
    Floats sums[R][ACROSS] = {};
    const int64_t apart = n == ACROSS ? width : 0; // of one column four sums are made, all the same
    const int64_t whole = terms / N * N;
    for (int64_t i = 0; i < whole; i += N) {
        if (first < last) {
            for (int c = 0; c < ACROSS; c++) __builtin_prefetch(next + c * width + first, 0, 3);
            first += N;
        }
        Terms<T> column[ACROSS];
        for (int c = 0; c < ACROSS; c++) column[c] = Terms<T>::load(weight + c * apart + i);
        for (int r = 0; r < R; r++) {
            const Terms<T> row = Terms<T>::load(x + r * width + i);
            for (int c = 0; c < ACROSS; c++) add_product(sums[r][c], row, column[c]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
        Four found = over_lanes(sums[r]), before = {};
        for (int64_t i = whole; i < terms; i++)
            for (int c = 0; c < ACROSS; c++) found[c] += as_float(x[r * width + i]) * as_float(weight[c * apart + i]);
        float *const place = to + r * GROUP;
        if (add) memcpy(&before, place, sizeof before);
        found += before;
        if (n == ACROSS)
            memcpy(place, &found, sizeof found);
        else
            *place = found[0];
    }
}

// to[rows][n] likewise, in blocks of nearly one size
template <typename T>
void sums_of_rows(int64_t rows, const T *x, const T *weight, int64_t width, float *to, int n, int64_t terms, bool add,
                  const T *next) {
    const int64_t blocks = (rows + DOWN<T> - 1) / DOWN<T>;
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t first = rows * block / blocks, end = rows * (block + 1) / blocks;
        const int64_t from = terms * block / blocks, up_to = terms * (block + 1) / blocks;
        const T *const some = x + first * width;
        float *const place = to + first * GROUP;
        switch (end - first) {
            case 6: sums_of<T, 6>(some, weight, width, place, n, terms, add, next, from, up_to); break;
            case 5: sums_of<T, 5>(some, weight, width, place, n, terms, add, next, from, up_to); break;
            case 4: sums_of<T, 4>(some, weight, width, place, n, terms, add, next, from, up_to); break;
            case 3: sums_of<T, 3>(some, weight, width, place, n, terms, add, next, from, up_to); break;
            case 2: sums_of<T, 2>(some, weight, width, place, n, terms, add, next, from, up_to); break;
            case 1: sums_of<T, 1>(some, weight, width, place, n, terms, add, next, from, up_to); break;
        }
    }
}

// columns [first, last) of the result.   sums: [rows][GROUP]
template <typename T>
void make_columns(const clipfast_cpu_linear_args &args, int64_t first, int64_t last, float *sums) {
    constexpr int64_t CHAIN = CHAIN_BYTES / sizeof(T);
    const T *const x = static_cast<const T *>(args.x);
    const T *const weight = static_cast<const T *>(args.weight);
    const int64_t width = args.terms;
    for (int64_t group = first; group < last; group += GROUP) {
        const int64_t end = group + GROUP < last ? group + GROUP : last;
        int64_t term = 0;
        do {
            const int64_t terms = width - term < CHAIN ? width - term : CHAIN;
            for (int64_t row = 0; row < args.rows; row += BLOCK) {
                const int64_t rows = args.rows - row < BLOCK ? args.rows - row : BLOCK;
                for (int64_t column = group; column < end;) {
                    const int n = end - column < ACROSS ? 1 : ACROSS;
                    // after the last column the next terms, after the last terms the next columns
                    const bool turn = column + n == end, finished = turn && term + terms == width;
                    const int64_t next = (turn && !finished ? group : column + n) * width;
                    sums_of_rows(rows, x + row * width + term, weight + column * width + term, width,
                                 sums + row * GROUP + column - group, n, terms, term > 0,
                                 weight + next + (finished ? 0 : turn ? term + terms : term));
                    column += n;
                }
            }
            term += terms;
        } while (term < width);
        for (int64_t column = group; column < end; column += LANES) {
            const Finish<T> finish(args, column, end - column);
            for (int64_t row = 0; row < args.rows; row++) finish(load(sums + row * GROUP + column - group), row);
        }
    }
}

template <typename T>
int few_rows(const clipfast_cpu_linear_args &args) {
    const int64_t steps = (args.columns + ACROSS - 1) / ACROSS;
    int failed = 0;
#pragma omp parallel num_threads(args.threads)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const int64_t first = steps * thread / threads * ACROSS, last = steps * (thread + 1) / threads * ACROSS;
        float *const sums = static_cast<float *>(malloc(4 * args.rows * GROUP));
        if (sums != nullptr) {
            make_columns<T>(args, first, last < args.columns ? last : args.columns, sums);
        } else {
#pragma omp atomic write
            failed = 1;
        }
        free(sums);
    }
    return failed ? CLIPFAST_CPU_ERROR_MEMORY : 0;
}

} // namespace

#endif
