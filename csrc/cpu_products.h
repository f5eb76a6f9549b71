// Products of words on a CPU, and how rows become the words of a product.
//
// What a step multiplies is a word: one float32, or two bfloat16 if the CPU multiplies those.
#ifndef CLIPFAST_CPU_PRODUCTS_H
#define CLIPFAST_CPU_PRODUCTS_H

#include <type_traits>

#include "cpu_vectors.h"

namespace {

// does this form multiply bfloat16 itself, or widen it first, which takes two registers for what float32 has in one?
#if defined(__AVX512BF16__)
constexpr bool MULTIPLIES_BFLOAT16 = true;
#else
constexpr bool MULTIPLIES_BFLOAT16 = false;
#endif
template <typename T>
constexpr bool WIDENS = sizeof(T) == 2 && !MULTIPLIES_BFLOAT16;

// a register of one side of a product, as it is in memory
template <typename T>
struct Terms {
    static constexpr int N = 4 * LANES / sizeof(T);
    Words bits;

    static Terms load(const T *from) {
        Terms terms;
        memcpy(&terms.bits, from, sizeof terms.bits);
        return terms;
    }
};

inline void add_product(Floats &sum, const Terms<float> &a, const Terms<float> &b) {
    sum += (Floats)a.bits * (Floats)b.bits;
}

// two neighbours go to one lane
inline void add_product(Floats &sum, const Terms<uint16_t> &a, const Terms<uint16_t> &b) {
#if defined(__AVX512BF16__)
    sum = (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a.bits, (__m512bh)b.bits);
#else
    sum += (Floats)(a.bits << 16) * (Floats)(b.bits << 16);
    sum += (Floats)(a.bits & 0xffff0000u) * (Floats)(b.bits & 0xffff0000u);
#endif
}

// what one step of a product multiplies: T, or float32 for a bfloat16 that was widened before
template <typename T>
using Stepped = std::conditional_t<WIDENS<T>, float, T>;

// a transposed register of words, which is one step; or two, of bfloat16 that is widened
template <bool WIDEN>
inline void put(uint32_t *to, Row words) {
    if constexpr (WIDEN) {
        const Row first = words << 16, second = words & 0xffff0000u;
        memcpy(to, &first, sizeof first);
        memcpy(to + LANES, &second, sizeof second);
    } else {
        memcpy(to, &words, sizeof words);
    }
}

// SQUARE words of SQUARE rows -> SQUARE steps, or (widened) twice as many
template <bool WIDEN>
inline __attribute__((always_inline)) void turn_square(const char *from, int64_t stride, uint32_t *to) {
#pragma GCC unroll 2
    for (int first = 0; first < SQUARE; first += 4) {
        Row words[4];
        turn_four(from + 4 * first, stride, words);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) put<WIDEN>(to + (first + i) * (WIDEN ? 2 : 1) * LANES, words[i]);
    }
}

// `bytes` bytes of a row, widened if need be, then zeros: `steps` steps
template <typename T>
void copy_row(const char *from, int64_t bytes, int64_t steps, uint32_t *to) {
    if constexpr (WIDENS<T>) {
        int64_t i = 0;
        for (; 2 * i < bytes; i += LANES) {
            const uint16_t *const some = reinterpret_cast<const uint16_t *>(from) + i;
            store(reinterpret_cast<float *>(to) + i, load_some(some, bytes / 2 - i));
        }
        for (; i < steps; i++) to[i] = 0;
    } else {
        if (bytes > 0) memcpy(to, from, bytes); // without terms there may be no x
        memset(reinterpret_cast<char *>(to) + bytes, 0, 4 * steps - bytes);
    }
}

} // namespace

#endif
