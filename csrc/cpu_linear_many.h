// A linear layer of many rows.
//
// The lanes are rows of x, which are laid out for it; a word of the weight, as it is, goes to all of them. Nothing is
// added up across lanes, and of the weight nothing is copied. One task is a block of rows and some of the columns. A word
// has 4 bytes, one float32 or two bfloat16, and a row is whole words.
#ifndef CLIPFAST_CPU_LINEAR_MANY_H
#define CLIPFAST_CPU_LINEAR_MANY_H

#include <cstdlib>

#include "cpu_linear.h"

namespace {

// registers of rows, and columns, whose sums are in registers together
template <typename T>
constexpr int TALL = LANES < 16 ? (WIDENS<T> ? 1 : 2) : WIDENS<T> ? 3 : 4;
constexpr int WIDE = 6;
constexpr int64_t PANEL = 96; // columns that are finished together
// words that are summed in one chain: longer ones would round more, the sooner where each product rounds too
constexpr int64_t LINK = LANES == 4 ? 32 : 128;
constexpr int64_t LINE = 16; // words that come from memory together

template <typename T>
constexpr int64_t IN_A_WORD = 4 / sizeof(T);

// rows of x, `words` long, so that a word of each is side by side, in registers: to[words][registers][LANES]
void lay_out(const char *x, int64_t words, int64_t rows, int registers, uint32_t *to) {
    for (int v = 0; v < registers; v++)
        for (int64_t word = 0; word < words; word += LANES) {
            const int64_t n = words - word < LANES ? words - word : LANES;
            Words block[LANES] = {};
            for (int i = 0; i < LANES && v * LANES + i < rows; i++)
                memcpy(&block[i], x + 4 * ((v * LANES + i) * words + word), 4 * n);
            transpose(block);
            for (int i = 0; i < n; i++)
                memcpy(to + ((word + i) * registers + v) * LANES, &block[i], sizeof block[i]);
        }
}

// to[WIDE][V][LANES] = (or +=) the sums over words [0, n) of x, as lay_out left it, with WIDE rows of the weight
template <typename T, int V>
void chain(const uint32_t *x, const T *const rows[WIDE], int64_t n, float *to, bool add, int64_t ahead) {
    Floats sums[WIDE][V] = {};
    for (int64_t i = 0; i < n; i++) {
        if (i % LINE == 0)
            for (int c = 0; c < WIDE; c++) __builtin_prefetch(rows[c] + ahead + i * IN_A_WORD<T>, 0, 2);
        Terms<T> row[V];
        for (int v = 0; v < V; v++) memcpy(&row[v], x + (i * V + v) * LANES, sizeof row[v]);
        for (int c = 0; c < WIDE; c++) {
            uint32_t word;
            memcpy(&word, rows[c] + i * IN_A_WORD<T>, sizeof word);
            const Terms<T> column = {Words{} + word};
            for (int v = 0; v < V; v++) add_product(sums[c][v], row[v], column);
        }
    }
    for (int c = 0; c < WIDE; c++)
        for (int v = 0; v < V; v++) {
            float *const place = to + (c * V + v) * LANES;
            store(place, add ? load(place) + sums[c][v] : sums[c][v]);
        }
}

template <typename T, int V>
void panels(const clipfast_cpu_linear_args &args, const uint32_t *x, int64_t first_row, int64_t rows, int64_t first,
            int64_t last, float *sums) {
    const T *const weight = static_cast<const T *>(args.weight);
    const int64_t words = args.terms / IN_A_WORD<T>;
    for (int64_t panel = first; panel < last; panel += PANEL) {
        const int64_t end = panel + PANEL < last ? panel + PANEL : last;
        for (int64_t word = 0; word < words; word += LINK) {
            const int64_t term = word * IN_A_WORD<T>, n = words - word < LINK ? words - word : LINK;
            const int64_t ahead = word + LINK < words ? LINK * IN_A_WORD<T> : PANEL * args.terms - term;
            for (int64_t column = panel; column < end; column += WIDE) {
                const T *rows_of[WIDE]; // beyond the last column that one again, for sums that nobody reads
                for (int c = 0; c < WIDE; c++)
                    rows_of[c] = weight + (column + c < end ? column + c : end - 1) * args.terms + term;
                chain<T, V>(x + word * V * LANES, rows_of, n, sums + (column - panel) * V * LANES, word > 0, ahead);
            }
        }
        for (int64_t column = panel; column < end; column += LANES) {
            const Finish<T> finish(args, column, end - column);
            for (int v = 0; v < V; v++) {
                Words block[LANES];
                for (int i = 0; i < LANES; i++)
                    memcpy(&block[i], sums + ((column - panel + i) * V + v) * LANES, sizeof block[i]);
                transpose(block);
                for (int i = 0; i < LANES && v * LANES + i < rows; i++)
                    finish((Floats)block[i], first_row + v * LANES + i);
            }
        }
    }
}

template <typename T>
int many_rows(const clipfast_cpu_linear_args &args) {
    const char *const x = static_cast<const char *>(args.x);
    const int64_t words = args.terms / IN_A_WORD<T>;
    const int64_t registers = (args.rows + LANES - 1) / LANES, blocks = (registers + TALL<T> - 1) / TALL<T>;
    int64_t parts = (16 * args.threads + blocks - 1) / blocks;
    const int64_t most = (args.columns + 2 * PANEL - 1) / (2 * PANEL);
    parts = parts < most ? parts : most;
    int failed = 0;
#pragma omp parallel num_threads(args.threads)
    {
        void *const memory = aligned_alloc(64, (4 * LANES * TALL<T> * (words + PANEL + LANES) + 63) / 64 * 64);
        uint32_t *const laid_out = static_cast<uint32_t *>(memory);
        float *const sums = static_cast<float *>(memory) + LANES * TALL<T> * words;
        if (memory == nullptr) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < blocks * parts; task++) {
            if (memory == nullptr) continue;
            const int64_t block = task / parts, part = task % parts;
            const int64_t from = registers * block / blocks, to = registers * (block + 1) / blocks;
            const int64_t row = from * LANES, rows = (to * LANES < args.rows ? to * LANES : args.rows) - row;
            const int64_t wides = (args.columns + WIDE - 1) / WIDE;
            const int64_t first = wides * part / parts * WIDE;
            int64_t last = wides * (part + 1) / parts * WIDE;
            last = last < args.columns ? last : args.columns;
            lay_out(x + 4 * row * words, words, rows, int(to - from), laid_out);
            switch (to - from) {
                case 4: panels<T, 4>(args, laid_out, row, rows, first, last, sums); break;
                case 3: panels<T, 3>(args, laid_out, row, rows, first, last, sums); break;
                case 2: panels<T, 2>(args, laid_out, row, rows, first, last, sums); break;
                case 1: panels<T, 1>(args, laid_out, row, rows, first, last, sums); break;
            }
        }
        free(memory);
    }
    return failed ? CLIPFAST_CPU_ERROR_MEMORY : 0;
}

} // namespace

#endif
