// Vectors of the instruction set that a file is compiled for: what the operators of libclipfast_cpu are written in.
//
// Everything is in an unnamed namespace: each set compiles it anew, and the linker must not take one's for another's.
#ifndef CLIPFAST_CPU_VECTORS_H
#define CLIPFAST_CPU_VECTORS_H

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

// CLIPFAST_FORM is the set's name, and so the end of each operator's
#define CLIPFAST_JOINED(name, form) name##_##form
#define CLIPFAST_EXPANDED(name, form) CLIPFAST_JOINED(name, form)
#define CLIPFAST_IN_THIS_FORM(name) CLIPFAST_EXPANDED(name, CLIPFAST_FORM)

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr float LOG2E = 1.44269504f;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
// how many of `unit` hold n, and what they hold
inline int64_t units(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }
inline int64_t up(int64_t n, int64_t unit) { return units(n, unit) * unit; }
inline int64_t padded(int64_t n) { return up(n, LANES); }

inline Floats load(const float *from) {
    Floats x;
    memcpy(&x, from, sizeof x);
    return x;
}

inline void store(float *to, Floats x) { memcpy(to, &x, sizeof x); }

// bfloat16, as the upper half of a float32
inline Floats load(const uint16_t *from) {
    Halves half;
    memcpy(&half, from, sizeof half);
    return (Floats)(__builtin_convertvector(half, Words) << 16);
}

// to the nearest, to even in the middle; a NaN stays one
inline void store(uint16_t *to, Floats x) {
#if defined(__AVX512BF16__)
    const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
#else
    const Words word = (Words)x;
    const Words rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    const Halves half = __builtin_convertvector((Words)(x == x ? (Ints)rounded : (Ints)(Words{} + 0x7fc0)), Halves);
#endif
    memcpy(to, &half, sizeof half);
}

// n of them, if that is less than LANES, and then zeros
template <typename T>
Floats load_some(const T *from, int64_t n) {
    if (n >= LANES) return load(from);
    T some[LANES] = {};
    memcpy(some, from, n * sizeof(T));
    return load(some);
}

template <typename T>
void store_some(T *to, Floats x, int64_t n) {
    if (n >= LANES) return store(to, x);
    T some[LANES];
    store(some, x);
    memcpy(to, some, n * sizeof(T));
}

// Where each lane of a shuffled register comes from. Made while compiling: a loop would make it anew each time.
struct Places {
    int32_t of[LANES];

    Ints vector() const {
        Ints places;
        memcpy(&places, of, sizeof places);
        return places;
    }
};

// each lane's other one at a distance of STEP
template <int STEP>
constexpr Places swapped() {
    Places places{};
    for (int i = 0; i < LANES; i++) places.of[i] = i ^ STEP;
    return places;
}

// x joined with itself STEP lanes off, then half as far and so on: with LANES / 2 every lane has met every other
template <int STEP, typename Join>
Floats across_lanes(Floats x, Join join) {
    if constexpr (STEP == 0) {
        return x;
    } else {
        static constexpr Places places = swapped<STEP>();
        return across_lanes<STEP / 2>(join(x, __builtin_shuffle(x, places.vector())), join);
    }
}

// What is transposed at a time, SQUARE words each way: registers of 16 take longer for a word than those of 8.
constexpr int SQUARE = LANES < 8 ? 4 : 8;
typedef uint32_t Row __attribute__((vector_size(4 * SQUARE)));

// A register of four words at `first`; one of eight has four at `second` behind them.
inline __attribute__((always_inline)) Row load_fours(const char *first, const char *second) {
#if defined(__AVX2__)
    return (Row)_mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)first)),
                                        _mm_loadu_si128((const __m128i *)second), 1);
#else
    (void)second;
    Row row;
    memcpy(&row, first, sizeof row);
    return row;
#endif
}

// Of each four lanes of a and b the first two, or the last two, in turn: lane by lane, or pair by pair.
#if defined(__AVX2__)
// by name: with AVX-512 GCC 12 would take a slower instruction, which permutes anything
inline Row first_lanes(Row a, Row b) { return (Row)_mm256_unpacklo_epi32((__m256i)a, (__m256i)b); }
inline Row last_lanes(Row a, Row b) { return (Row)_mm256_unpackhi_epi32((__m256i)a, (__m256i)b); }
inline Row first_pairs(Row a, Row b) { return (Row)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b); }
inline Row last_pairs(Row a, Row b) { return (Row)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b); }
#else
inline Row first_lanes(Row a, Row b) { return __builtin_shuffle(a, b, Row{0, 4, 1, 5}); }
inline Row last_lanes(Row a, Row b) { return __builtin_shuffle(a, b, Row{2, 6, 3, 7}); }
inline Row first_pairs(Row a, Row b) { return __builtin_shuffle(a, b, Row{0, 1, 4, 5}); }
inline Row last_pairs(Row a, Row b) { return __builtin_shuffle(a, b, Row{2, 3, 6, 7}); }
#endif

// words[i]: word i of SQUARE rows that are `stride` bytes apart. Rows j and j + 4 share a register, so that one transposition
// of 4 x 4 serves both: half the shuffles of reading whole rows.
inline __attribute__((always_inline)) void turn_four(const char *from, int64_t stride, Row words[4]) {
    Row rows[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) rows[i] = load_fours(from + i * stride, from + (4 + i) * stride);
    const Row a = first_lanes(rows[0], rows[1]), b = last_lanes(rows[0], rows[1]);
    const Row c = first_lanes(rows[2], rows[3]), d = last_lanes(rows[2], rows[3]);
    words[0] = first_pairs(a, c);
    words[1] = last_pairs(a, c);
    words[2] = first_pairs(b, d);
    words[3] = last_pairs(b, d);
}

// exp(x) for x <= 0, and 0 below -87: Cody and Waite's reduction, a polynomial of degree 6. NaN stays NaN
inline Floats exp_of_negative(Floats x) {
    constexpr float ROUND = 12582912.0f; // 1.5 * 2^23: adding it leaves no fraction
    const Floats n = (x * LOG2E + ROUND) - ROUND;
    const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = r * 1.9875691e-4f + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665795e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 0.5f;
    p = p * (r * r) + r + 1.0f;
    const Floats power = (Floats)((__builtin_convertvector(n, Ints) + 127) << 23), zero = {};
    return x < -87.0f ? zero : p * power;
}

} // namespace

#endif
