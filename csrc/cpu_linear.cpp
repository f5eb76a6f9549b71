// A linear layer on a CPU, compiled once for each instruction set (CMakeLists.txt).
//
// The weight stays as it is, [columns, terms]: a library that wants it in an order of its own copies it in each call.
#include "cpu_linear_few.h"
#include "cpu_linear_many.h"

namespace {

// rows up to which it is few: measured on an AMD Zen 5
template <typename T>
constexpr int64_t FEW = sizeof(T) == 4 ? 256 : 96;

template <typename T>
int linear(const clipfast_cpu_linear_args &args) {
    if (args.rows == 0 || args.columns == 0) return CLIPFAST_CPU_OK;
    const bool whole_words = args.terms > 0 && args.terms % IN_A_WORD<T> == 0;
    return args.rows <= FEW<T> || !whole_words ? few_rows<T>(args) : many_rows<T>(args);
}

} // namespace

int CLIPFAST_IN_THIS_FORM(clipfast_cpu_linear)(const clipfast_cpu_linear_args &args) {
    return args.dtype == CLIPFAST_CPU_BFLOAT16 ? linear<uint16_t>(args) : linear<float>(args);
}
