// What becomes of the sums of a linear layer on a CPU.
#ifndef CLIPFAST_CPU_LINEAR_H
#define CLIPFAST_CPU_LINEAR_H

#include "clipfast_cpu.h"
#include "cpu_products.h"

namespace {

constexpr float QUICK = 1.702f;

// ---------------------------------------------------------------------------------------------------------------------
// From sums to results

// x sigmoid(1.702 x)
Floats quick_gelu(Floats x) {
    const Floats z = QUICK * x, zero = {};
    const Floats power = exp_of_negative(z < zero ? z : -z);
    return x * ((z < zero ? power : zero + 1.0f) / (1.0f + power));
}

// x Phi(x). The normal distribution's tail at |x| is exp(-x^2 / 2) q(t), t = 1 / (1 + 0.3 |x|); q was fitted to 6e-8 of
// it for |x| up to 13, where the power is 0 in float32.
Floats gelu(Floats x) {
    const Floats zero = {};
    const Floats size = x < zero ? -x : x;
    const Floats t = 1.0f / (1.0f + 0.3f * size);
    Floats q = t * 0.03831158205866814f - 0.1688414365053177f;
    q = q * t + 0.22798839211463928f;
    q = q * t - 0.07573699206113815f;
    q = q * t + 0.14200304448604584f;
    q = q * t + 0.09491081535816193f;
    q = q * t + 0.12186204642057419f;
    q = q * t + 0.11949588358402252f;
    q = q * t + 6.686325832561124e-06f;
    const Floats share = exp_of_negative(-0.5f * size * size) * q;
    return x < zero ? x * share : share > zero ? x - x * share : x; // of infinity there is no share
}

Floats activated(Floats x, int activation) {
    if (activation == CLIPFAST_CPU_QUICK_GELU) return quick_gelu(x);
    return activation == CLIPFAST_CPU_GELU ? gelu(x) : x;
}

// What becomes of the sums of columns [column, column + n), n <= LANES or more: bias, activation, residual.
template <typename T>
struct Finish {
    const clipfast_cpu_linear_args &args;

    explicit Finish(const clipfast_cpu_linear_args &args) : args(args) {}

    inline __attribute__((always_inline)) void operator()(Floats sums, int64_t row, int64_t column, int64_t n) const {
        const int64_t place = row * args.columns + column;
        if (args.bias != nullptr) sums += load_some(static_cast<const T *>(args.bias) + column, n);
        sums = activated(sums, args.activation);
        if (args.residual != nullptr) sums += load_some(static_cast<const T *>(args.residual) + place, n);
        store_some(static_cast<T *>(args.out) + place, sums, n);
    }
};

} // namespace

#endif
