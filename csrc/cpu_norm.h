// LayerNorm of a row, for operators that begin with one.
#ifndef CLIPFAST_CPU_NORM_H
#define CLIPFAST_CPU_NORM_H

#include "cpu_vectors.h"

namespace {

struct Norm {
    const float *weight, *bias; // [n]
    float eps;
};

// LayerNorm of a row in float32, rounded to T as an operator of its own would return it
template <typename T>
void normalise(const T *row, int64_t n, Norm norm, T *to) {
    const auto plus = [](Floats a, Floats b) { return a + b; };
    Floats sums = {}, rest = {}, squares = {};
    for (int64_t i = 0; i < n; i += LANES) sums += load_some(row + i, n - i);
    const float about = across_lanes<LANES / 2>(sums, plus)[0] / float(n);
    for (int64_t i = 0; i < n; i += LANES) {
        Floats off = load_some(row + i, n - i) - about;
        for (int64_t lane = n - i; lane < LANES; lane++) off[lane] = 0;
        rest += off;
        squares += off * off;
    }
    // where numbers are far from zero, their sum was rounded more than what is left of it now
    const float mean = across_lanes<LANES / 2>(rest, plus)[0] / float(n);
    const float variance = across_lanes<LANES / 2>(squares, plus)[0] / float(n) - mean * mean;
    const float scale = 1 / __builtin_sqrtf(variance + norm.eps);
    for (int64_t i = 0; i < n; i += LANES) {
        const Floats off = (load_some(row + i, n - i) - about - mean) * scale;
        store_some(to + i, off * load_some(norm.weight + i, n - i) + load_some(norm.bias + i, n - i), n - i);
    }
}

} // namespace

#endif
