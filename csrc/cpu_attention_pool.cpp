// One query for each sequence attends to all its rows, with the three projections, compiled once for each instruction set
// (CMakeLists.txt).
//
// With one query the products reassociate, q.(Wk y) = (Wk^T q).y and sum p (Wv y) = Wv (sum p y): keys and values of the
// rows are never computed, and reading the three weights is most of the work. Three passes, after a LayerNorm of the rows
// where the queries are among them: `direct` folds a head's query into its keys' weight, `attend` weighs a sequence's rows
// by it, `finish` multiplies their mean by the values' weight.
// Sums round more in this order, so those of float32 are float64, and those of bfloat16 float32.
#include <omp.h>
#include <type_traits>

#include "clipfast_cpu.h"
#include "cpu_memory.h"
#include "cpu_norm.h"

namespace {

constexpr int64_t SEQUENCES = 16; // for which a weight is read once, at most
constexpr int DOWN = 4;           // heads, or rows of a weight, that are multiplied together
constexpr int ACROSS = 2;         // rows or sequences that each is multiplied by

typedef double Doubles __attribute__((vector_size(4 * LANES)));
typedef float Singles __attribute__((vector_size(2 * LANES)));

// what rows of T are summed in
template <typename T>
using Sum = std::conditional_t<sizeof(T) == 2, float, double>;
template <typename S>
using Vector = std::conditional_t<sizeof(S) == 4, Floats, Doubles>;
template <typename S>
constexpr int64_t WIDE = 4 * LANES / sizeof(S); // in a register

inline Floats wide(const uint16_t *from, float) { return load(from); }
inline Floats wide(const float *from, float) { return load(from); }

inline Doubles wide(const float *from, double) {
    Singles x;
    memcpy(&x, from, sizeof x);
    return __builtin_convertvector(x, Doubles);
}

inline Doubles wide(const double *from, double) {
    Doubles x;
    memcpy(&x, from, sizeof x);
    return x;
}

// a register of S; if there are only n, or none, then zeros
template <typename S, typename T>
inline Vector<S> wide_some(const T *from, int64_t n) {
    if (n >= WIDE<S>) return wide(from, S{});
    T some[WIDE<S>] = {};
    if (n > 0) memcpy(some, from, n * sizeof(T));
    return wide(some, S{});
}

template <typename S>
inline S total(Vector<S> x) {
    S sum = 0;
    for (int i = 0; i < WIDE<S>; i++) sum += x[i];
    return sum;
}

inline float one(const float *from) { return *from; }
inline float one(const uint16_t *from) { return load_some(from, 1)[0]; }
inline void put(float *to, double x) { *to = float(x); }
inline void put(uint16_t *to, float x) { store_some(to, Floats{} + x, 1); }

// out[R][C] = a[R][n] . b[C][n]
template <int R, int C, typename A, typename B, typename S>
void dots(const A *a, int64_t a_stride, const B *b, int64_t b_stride, int64_t n, S (*out)[ACROSS]) {
    Vector<S> sums[R][C] = {};
    for (int64_t i = 0; i < n; i += WIDE<S>) {
        Vector<S> column[C];
        for (int c = 0; c < C; c++) column[c] = wide_some<S>(b + c * b_stride + i, n - i);
        for (int r = 0; r < R; r++) {
            const Vector<S> row = wide_some<S>(a + r * a_stride + i, n - i);
            for (int c = 0; c < C; c++) sums[r][c] += row * column[c];
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) out[r][c] = total<S>(sums[r][c]);
}

template <int R = DOWN, typename A, typename B, typename S>
void dots_of(int64_t rows, int64_t columns, const A *a, int64_t a_stride, const B *b, int64_t b_stride, int64_t n,
             S (*out)[ACROSS]) {
    if constexpr (R > 1)
        if (rows < R) return dots_of<R - 1>(rows, columns, a, a_stride, b, b_stride, n, out);
    if (columns < ACROSS)
        dots<R, 1>(a, a_stride, b, b_stride, n, out);
    else
        dots<R, ACROSS>(a, a_stride, b, b_stride, n, out);
}

// to[R][n] = factor weights[R][k] . rows[k][n], a line of memory after the other; `to` is written up to a whole line
template <int R, typename S, typename T>
void mix(const S *weights, int64_t w_stride, const T *rows, int64_t stride, int64_t k, int64_t n, S factor, S *to,
         int64_t to_stride) {
    constexpr int64_t EACH = 2 * WIDE<S>;
    for (int64_t i = 0; i < n; i += EACH) {
        Vector<S> sums[R][2] = {};
        for (int64_t j = 0; j < k; j++) {
            const T *const from = rows + j * stride + i;
            const Vector<S> first = wide_some<S>(from, n - i), second = wide_some<S>(from + WIDE<S>, n - i - WIDE<S>);
            for (int r = 0; r < R; r++) {
                sums[r][0] += first * weights[r * w_stride + j];
                sums[r][1] += second * weights[r * w_stride + j];
            }
        }
        for (int r = 0; r < R; r++)
            for (int c = 0; c < 2; c++) {
                sums[r][c] *= factor;
                memcpy(to + r * to_stride + i + c * WIDE<S>, &sums[r][c], sizeof sums[r][c]);
            }
    }
}

template <int R = DOWN, typename S, typename T>
void mix_of(int64_t n_weights, const S *weights, int64_t w_stride, const T *rows, int64_t stride, int64_t k, int64_t n,
            S factor, S *to, int64_t to_stride) {
    if constexpr (R > 1)
        if (n_weights < R)
            return mix_of<R - 1>(n_weights, weights, w_stride, rows, stride, k, n, factor, to, to_stride);
    mix<R>(weights, w_stride, rows, stride, k, n, factor, to, to_stride);
}

// scores -> their softmax
template <typename S>
void softmax(S *scores, int64_t n) {
    S greatest = scores[0], sum = 0;
    for (int64_t j = 1; j < n; j++) greatest = scores[j] > greatest ? scores[j] : greatest;
    for (int64_t j = 0; j < n; j += LANES) {
        const int64_t some = least(n - j, LANES);
        Floats x = {};
        for (int64_t i = 0; i < some; i++) x[i] = float(scores[j + i] - greatest);
        x = exp_of_negative(x);
        for (int64_t i = 0; i < some; i++) sum += scores[j + i] = x[i];
    }
    for (int64_t j = 0; j < n; j++) scores[j] /= sum;
}

template <typename T>
struct Pool {
    typedef Sum<T> S;
    const clipfast_cpu_attention_pool_args &args;
    const int64_t terms, head, heads, wide_terms, longest;
    // of the sequences that pass together: their queries, and their rows from row `start` on
    const T *queries = nullptr, *tokens = nullptr;
    int64_t start = 0;

    Pool(const clipfast_cpu_attention_pool_args &args, int64_t longest)
        : args(args), terms(args.terms), head(args.inner / args.heads), heads(args.heads),
          wide_terms(up(args.terms, 2 * WIDE<S>)), longest(longest) {}

    int64_t sums_of_thread() const { return apart(sizeof(S) * (DOWN * longest + SEQUENCES * head)) / int64_t(sizeof(S)); }
    int64_t sums() const { return apart(sizeof(S) * SEQUENCES * heads * wide_terms) / int64_t(sizeof(S)); }
    const T *row(const void *matrix, int64_t row) const { return static_cast<const T *>(matrix) + row * terms; }
    S at(const void *vector, int64_t i) const {
        return vector == nullptr ? 0 : one(static_cast<const T *>(vector) + i);
    }

    // Wk^T q of a head: directions[n][heads][wide_terms], of which this head's are written.   q: [n][head]
    void direct(int64_t h, int64_t n, S *directions, S *q) const {
        const S scale = S(1 / __builtin_sqrt(double(head)));
        const int64_t begin = h * head;
        for (int64_t d = 0; d < head; d += DOWN)
            for (int64_t b = 0; b < n; b += ACROSS) {
                S found[DOWN][ACROSS];
                const int64_t rows = least(head - d, DOWN), some = least(n - b, ACROSS);
                dots_of(rows, some, row(args.q_weight, begin + d), terms, queries + b * terms, terms, terms, found);
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t c = 0; c < some; c++)
                        q[(b + c) * head + d + r] = found[r][c] + at(args.q_bias, begin + d + r);
            }
        for (int64_t b = 0; b < n; b += DOWN)
            mix_of(n - b, q + b * head, head, row(args.k_weight, begin), terms, head, terms, scale,
                   directions + (b * heads + h) * wide_terms, heads * wide_terms);
    }

    // of up to DOWN heads of a sequence: directions -> the rows' mean by their weights.   scores: [DOWN][longest]
    void attend(int64_t sequence, int64_t n, S *directions, S *scores) const {
        const int64_t rows = args.offsets[sequence + 1] - args.offsets[sequence];
        const T *const own = tokens + (args.offsets[sequence] - start) * terms;
        for (int64_t j = 0; j < rows; j += ACROSS) {
            S found[DOWN][ACROSS];
            const int64_t some = least(rows - j, ACROSS);
            dots_of(n, some, directions, wide_terms, own + j * terms, terms, terms, found);
            for (int64_t r = 0; r < n; r++)
                for (int64_t c = 0; c < some; c++) scores[r * longest + j + c] = found[r][c];
        }
        for (int64_t r = 0; r < n; r++) softmax(scores + r * longest, rows);
        mix_of(n, scores, longest, own, terms, rows, terms, S(1), directions, wide_terms);
    }

    // Wv times the means of a head
    void finish(int64_t h, int64_t first, int64_t n, const S *means) const {
        for (int64_t d = h * head; d < (h + 1) * head; d += DOWN)
            for (int64_t b = 0; b < n; b += ACROSS) {
                S found[DOWN][ACROSS];
                const int64_t rows = least((h + 1) * head - d, DOWN), some = least(n - b, ACROSS);
                dots_of(rows, some, row(args.v_weight, d), terms, means + (b * heads + h) * wide_terms, heads * wide_terms,
                        terms, found);
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t c = 0; c < some; c++)
                        put(static_cast<T *>(args.out) + (first + b + c) * args.inner + d + r,
                               found[r][c] + at(args.v_bias, d + r));
            }
    }
};

template <typename T>
int pool(const clipfast_cpu_attention_pool_args &args) {
    int64_t longest = 0, most = 0; // rows of a sequence, and of those that pass together
    for (int64_t i = 0; i < args.sequences; i++) {
        const int64_t length = args.offsets[i + 1] - args.offsets[i];
        longest = length > longest ? length : longest;
    }
    for (int64_t i = 0; i < args.sequences; i += SEQUENCES) {
        const int64_t together = args.offsets[least(i + SEQUENCES, args.sequences)] - args.offsets[i];
        most = together > most ? together : most;
    }
    const Pool<T> shared(args, longest);
    const T *const tokens = static_cast<const T *>(args.tokens);
    const int64_t terms = args.terms;
    const Norm norm{static_cast<const float *>(args.norm_weight), static_cast<const float *>(args.norm_bias), args.eps};
    static thread_local Memory kept;
    typedef Sum<T> S;
    const int64_t of_sums = sizeof(S) * (shared.sums() + args.threads * shared.sums_of_thread());
    const int64_t of_rows = args.index == nullptr ? 0 : SEQUENCES + most;
    char *const memory = static_cast<char *>(kept.reserve(of_sums + of_rows * terms * int64_t(sizeof(T))));
    if (memory == nullptr) return CLIPFAST_CPU_ERROR_MEMORY;
    S *const directions = reinterpret_cast<S *>(memory);
    T *const queries = reinterpret_cast<T *>(memory + of_sums), *const normed = queries + SEQUENCES * terms;
    const int64_t parts = units(shared.heads, DOWN); // of a sequence's heads
#pragma omp parallel num_threads(args.threads)
    {
        Pool<T> pool = shared;
        S *const own = directions + pool.sums() + omp_get_thread_num() * pool.sums_of_thread();
        for (int64_t first = 0; first < args.sequences; first += SEQUENCES) {
            const int64_t n = least(args.sequences - first, SEQUENCES);
            pool.start = args.offsets[first];
            if (args.index == nullptr) {
                pool.tokens = tokens + pool.start * terms;
                pool.queries = static_cast<const T *>(args.query) + first * terms;
            } else {
#pragma omp for schedule(static)
                for (int64_t r = pool.start; r < args.offsets[first + n]; r++)
                    normalise(tokens + r * terms, terms, norm, normed + (r - pool.start) * terms);
#pragma omp for schedule(static)
                for (int64_t i = 0; i < n; i++)
                    memcpy(queries + i * terms, normed + (args.index[first + i] - pool.start) * terms, terms * sizeof(T));
                pool.tokens = normed;
                pool.queries = queries;
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t h = 0; h < pool.heads; h++) pool.direct(h, n, directions, own);
#pragma omp for schedule(dynamic, 1)
            for (int64_t task = 0; task < n * parts; task++) {
                const int64_t b = task / parts, h = task % parts * DOWN;
                pool.attend(first + b, least(pool.heads - h, DOWN), directions + (b * pool.heads + h) * pool.wide_terms,
                            own);
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t h = 0; h < pool.heads; h++) pool.finish(h, first, n, directions);
        }
    }
    return CLIPFAST_CPU_OK;
}

} // namespace

int CLIPFAST_IN_THIS_FORM(clipfast_cpu_attention_pool)(const clipfast_cpu_attention_pool_args &args) {
    return args.dtype == CLIPFAST_CPU_BFLOAT16 ? pool<uint16_t>(args) : pool<float>(args);
}
