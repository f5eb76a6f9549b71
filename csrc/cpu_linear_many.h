// A linear layer of many rows.
//
// The lanes are rows of x, which are laid out for it; a word of the weight, as it is, goes to all of them. Nothing is
// added up across lanes, and of the weight nothing is copied. One task is a block of rows and some of the columns.
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
// words of 4 bytes that are summed in one chain: longer ones would round more, the sooner where each product rounds too
constexpr int64_t LINK = LANES == 4 ? 32 : 128;
constexpr int64_t LINE = 16; // words that come from memory together

int64_t words_of(int64_t terms, int64_t size) { return (terms * size + 3) / 4; }

// up to LANES words of n bytes, then zeros
inline Words load_words(const void *from, int64_t n) {
    Words words = {};
    memcpy(&words, from, n < int64_t(sizeof words) ? n : sizeof words);
    return words;
}

// Rows of x so that a word of each is side by side, in registers: to[words][registers][LANES]
template <typename T>
void lay_out(const T *x, int64_t width, int64_t rows, int registers, uint32_t *to) {
    for (int v = 0; v < registers; v++)
        for (int64_t term = 0; term < width; term += Terms<T>::N) {
            const int64_t bytes = (width - term) * sizeof(T), words = (bytes + 3) / 4;
            Words block[LANES];
            for (int i = 0; i < LANES; i++)
                block[i] = v * LANES + i < rows ? load_words(x + (v * LANES + i) * width + term, bytes) : Words{};
            transpose(block);
            for (int i = 0; i < LANES && i < words; i++)
                memcpy(to + ((term * int64_t(sizeof(T)) / 4 + i) * registers + v) * LANES, &block[i], sizeof block[i]);
        }
}

// to[WIDE][V][LANES] = (or +=) the sums over words [0, n) of x, as lay_out left it, with WIDE rows of the weight
template <typename T, int V>
void chain(const uint32_t *x, const T *const rows[WIDE], int64_t n, float *to, bool add, int64_t ahead) {
    Floats sums[WIDE][V] = {};
    for (int64_t i = 0; i < n; i++) {
        if (i % LINE == 0)
            for (int c = 0; c < WIDE; c++) __builtin_prefetch(rows[c] + ahead + i * (4 / sizeof(T)), 0, 2);
        Terms<T> row[V];
        for (int v = 0; v < V; v++) memcpy(&row[v], x + (i * V + v) * LANES, sizeof row[v]);
        for (int c = 0; c < WIDE; c++) {
            uint32_t word;
            memcpy(&word, rows[c] + i * (4 / sizeof(T)), sizeof word);
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
    const int64_t words = words_of(args.terms, sizeof(T));
    for (int64_t panel = first; panel < last; panel += PANEL) {
        const int64_t end = panel + PANEL < last ? panel + PANEL : last;
        for (int64_t word = 0; word < words; word += LINK) {
            const int64_t term = word * (4 / sizeof(T)), n = words - word < LINK ? words - word : LINK;
            const int64_t ahead = word + LINK < words ? LINK * (4 / sizeof(T)) : PANEL * args.terms - term;
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
                    finish(as_floats(block[i]), first_row + v * LANES + i);
            }
        }
    }
}

template <typename T>
int many_rows(const clipfast_cpu_linear_args &args) {
    const T *const x = static_cast<const T *>(args.x);
    const int64_t words = words_of(args.terms, sizeof(T));
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
            lay_out(x + row * args.terms, args.terms, rows, int(to - from), laid_out);
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
