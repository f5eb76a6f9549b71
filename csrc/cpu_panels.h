// Panels of a weight and chains of rows, in the order in which csrc/cpu_linear.cpp multiplies them.
//
// A panel is some columns of the weight over a chain of its terms, transposed: [ACROSS][steps][LANES columns], small
// enough for the first cache. Words: cpu_products.h.
#ifndef CLIPFAST_CPU_PANELS_H
#define CLIPFAST_CPU_PANELS_H

#include "cpu_linear.h"
#include "cpu_memory.h"

namespace {

constexpr int ACROSS = 2; // registers
constexpr int PANEL = ACROSS * LANES;
// steps that are summed in one chain: longer ones would round more, the sooner where each product rounds too
constexpr int64_t CHAIN = LANES == 4 ? 32 : 192;
constexpr int64_t UNROLLED = 8; // steps; the words of a chain are filled up with zeros to a multiple of them
constexpr int64_t LINE = 64;    // bytes that come from memory together

// a word of memory, 4 bytes, is one step, or two of bfloat16 that is widened
template <typename T>
constexpr int64_t STEPS = WIDENS<T> ? 2 : 1;

// How the words of a row are cut into chains of nearly one length.
template <typename T>
struct Chains {
    int64_t bytes, words;  // of a row in memory
    int64_t length, count; // words of a chain, and how many there are; one without words if there are no terms

    explicit Chains(int64_t terms) : bytes(terms * int64_t(sizeof(T))), words(units(bytes, 4)), length(0), count(1) {
        if (words == 0) return;
        length = up(units(words, units(words, CHAIN / STEPS<T>)), UNROLLED);
        count = units(words, length);
    }

    int64_t bytes_of(int64_t chain) const { return least(bytes - 4 * chain * length, 4 * length); }
    int64_t words_of(int64_t chain) const { return up(least(words - chain * length, length), UNROLLED); }
    int64_t all_words() const { return up(words, UNROLLED); }
};

// Lines of memory that are asked for in turns: `bytes` bytes of `rows` rows that are `stride` bytes apart.
struct Ahead {
    const char *at;
    int64_t stride, lines, left, of_row, each;

    Ahead(const void *from, int64_t rows, int64_t stride, int64_t bytes, int64_t turns)
        : at(static_cast<const char *>(from)), stride(stride), lines(units(bytes, LINE)), left(rows * lines),
          of_row(lines), each(turns == 0 ? 0 : units(left, turns)) {}

    inline __attribute__((always_inline)) void turn() {
        for (int64_t i = 0; i < each && left > 0; i++, left--) {
            __builtin_prefetch(at, 0, 2);
            at += LINE;
            if (--of_row == 0) {
                at += stride - lines * LINE;
                of_row = lines;
            }
        }
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// From rows of the weight to a panel

// `bytes` bytes of `columns` rows of the weight -> a panel of `words` words, or (widened) of twice as many steps; zeros
// in columns and terms that there are not.   done: words that are there already, whole squares
template <bool WIDEN>
void make_panel(const char *weight, int64_t stride, int64_t columns, int64_t bytes, int64_t words, uint32_t *to,
                int64_t done = 0) {
    constexpr int64_t APART = (WIDEN ? 2 : 1) * LANES; // of two words
    for (int64_t first = 0; first < PANEL; first += SQUARE) {
        uint32_t *const place = to + first / LANES * words * APART + first % LANES;
        const int64_t n = least(columns - first, SQUARE), whole = n == SQUARE ? bytes / (4 * SQUARE) * SQUARE : 0;
        const char *const rows = weight + first * stride;
        for (int64_t word = done; word < whole; word += SQUARE)
            turn_square<WIDEN>(rows + 4 * word, stride, place + word * APART);
        for (int64_t word = whole; word < words; word += SQUARE) {
            char some[SQUARE][4 * SQUARE] = {};
            const int64_t left = least(bytes - 4 * word, 4 * SQUARE);
            for (int64_t i = 0; i < n && left > 0; i++) memcpy(some[i], rows + i * stride + 4 * word, left);
            turn_square<WIDEN>(some[0], 4 * SQUARE, place + word * APART);
        }
    }
}

// a register of columns over the terms of one step, of which there are `terms`, rows of the transposed weight
template <typename T>
inline Words one_step(const T *from, int64_t stride, int64_t columns, int64_t terms) {
    if constexpr (sizeof(T) == 4 || WIDENS<T>) {
        return terms > 0 ? (Words)load_some(from, columns) : Words{};
    } else {
        // a bfloat16 is the upper half of a float32
        const Words first = terms > 0 ? (Words)load_some(from, columns) >> 16 : Words{};
        return terms > 1 ? first | (Words)load_some(from + stride, columns) : first;
    }
}

// `terms` rows of `columns` of a weight [terms, stride] -> a panel of `steps` steps
template <typename T>
void copy_panel(const T *weight, int64_t stride, int64_t columns, int64_t terms, int64_t steps, uint32_t *to) {
    constexpr int64_t EACH = sizeof(T) == 2 && !WIDENS<T> ? 2 : 1; // terms of a step
    for (int64_t v = 0; v < ACROSS; v++)
        for (int64_t i = 0; i < steps; i++) {
            const int64_t n = least(columns - v * LANES, LANES);
            const T *const from = weight + EACH * i * stride + v * LANES;
            const Words step = n > 0 ? one_step(from, stride, n, terms - EACH * i) : Words{};
            memcpy(to + (v * steps + i) * LANES, &step, sizeof step);
        }
}

// a panel that was made before, and not widened, widened
void widen_panel(const uint32_t *packed, int64_t words, uint32_t *to) {
    for (int64_t i = 0; i < words * PANEL; i += SQUARE) {
        Row row;
        memcpy(&row, packed + i, sizeof row);
        put<true>(to + i / LANES * 2 * LANES + i % LANES, row);
    }
}

inline int64_t panels_in(int64_t columns) { return units(columns, PANEL); }

// args.bytes; and args.packed, if it is not null: [panels][chains][ACROSS][words][LANES], filled up with zeros
template <typename T>
int pack(const clipfast_cpu_pack_args &args) {
    const Chains<T> chains(args.terms);
    const int64_t panels = panels_in(args.columns), words = chains.all_words() * PANEL;
    *static_cast<int64_t *>(args.bytes) = 4 * panels * words;
    if (args.packed == nullptr) return CLIPFAST_CPU_OK;
    use_large_pages(args.packed, 4 * panels * words);
#pragma omp parallel for schedule(static) num_threads(args.threads)
    for (int64_t panel = 0; panel < panels; panel++) {
        const char *const from = static_cast<const char *>(args.weight) + panel * PANEL * chains.bytes;
        uint32_t *const to = static_cast<uint32_t *>(args.packed) + panel * words;
        for (int64_t c = 0; c < chains.count; c++)
            make_panel<false>(from + 4 * c * chains.length, chains.bytes, args.columns - panel * PANEL, chains.bytes_of(c),
                              chains.words_of(c), to + c * chains.length * PANEL);
    }
    return CLIPFAST_CPU_OK;
}

} // namespace

#endif
