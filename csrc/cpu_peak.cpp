// What a CPU multiplies and adds at best: a loop with all it needs in registers. Compiled once for each instruction set
// (CMakeLists.txt).
#include "clipfast_cpu.h"
#include "cpu_linear.h"

namespace {

// sums that do not wait for one another: enough for two units of six cycles, few enough for 16 registers
constexpr int SUMS = 12;

// to 2, from wherever it starts: no zeros, no infinities, no denormals
inline void step(Floats &sum, const Terms<float> &) { sum = sum * 0.5f + 1.0f; }
inline void step(Floats &sum, const Terms<uint16_t> &ones) { add_product(sum, ones, ones); }

template <typename T>
int peak(const clipfast_cpu_peak_args &args) {
    int64_t threads = 0;
#pragma omp parallel num_threads(args.threads) reduction(+ : threads)
    {
        Floats sums[SUMS];
        // all different and not known beforehand, or the compiler would spare itself some
        for (int s = 0; s < SUMS; s++) sums[s] = Floats{} + float(args.steps % 7 + s);
        const Terms<T> ones = {Words{} + 0x3f803f80};
        for (int64_t i = 0; i < args.steps; i++) {
#pragma GCC unroll 12
            for (int s = 0; s < SUMS; s++) step(sums[s], ones);
        }
        // somebody reads them, as far as the compiler knows
        asm volatile("" : : "m"(sums));
        threads += 1;
    }
    // there may be fewer than asked for
    *static_cast<int64_t *>(args.flops) = 2 * threads * args.steps * SUMS * Terms<T>::N;
    return CLIPFAST_CPU_OK;
}

} // namespace

int CLIPFAST_IN_THIS_FORM(clipfast_cpu_peak)(const clipfast_cpu_peak_args &args) {
    // who widens bfloat16 multiplies float32
    return args.dtype == CLIPFAST_CPU_BFLOAT16 && MULTIPLIES_BFLOAT16 ? peak<uint16_t>(args) : peak<float>(args);
}
