// The entry points of libclipfast_cpu: arguments are checked here, once, and the form for this CPU is chosen.
#include "clipfast_cpu.h"

// One for each instruction set, all from cpu_attention.cpp.
int clipfast_cpu_attention_baseline(const clipfast_cpu_attention_args &args);
int clipfast_cpu_attention_avx2(const clipfast_cpu_attention_args &args);
int clipfast_cpu_attention_avx512(const clipfast_cpu_attention_args &args);

namespace {

bool has(int instructions) {
#if defined(__x86_64__)
    switch (instructions) {
        case CLIPFAST_CPU_BASELINE: return true;
        // what separates x86-64-v3 and v4 from the CPUs before them
        case CLIPFAST_CPU_AVX2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
        case CLIPFAST_CPU_AVX512:
            return has(CLIPFAST_CPU_AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl");
    }
    return false;
#else
    return instructions == CLIPFAST_CPU_BASELINE;
#endif
}

int best() {
    int instructions = CLIPFAST_CPU_AVX512;
    while (!has(instructions)) instructions--;
    return instructions;
}

bool valid(const clipfast_cpu_attention_args *args) {
    return args != nullptr && args->struct_size == sizeof *args && args->sequences >= 0 && args->heads > 0 &&
           args->width > 0 && args->threads > 0 &&
           (args->dtype == CLIPFAST_CPU_FLOAT32 || args->dtype == CLIPFAST_CPU_BFLOAT16) &&
           (args->sequences == 0 || (args->qkv != nullptr && args->out != nullptr && args->offsets != nullptr));
}

} // namespace

int clipfast_cpu_abi_version(void) { return CLIPFAST_CPU_ABI_VERSION; }

const char *clipfast_cpu_error_text(int code) {
    switch (code) {
        case CLIPFAST_CPU_OK: return "no error";
        case CLIPFAST_CPU_ERROR_ARGUMENT:
            return "a null pointer, a size out of range, an unknown dtype, or arguments of another version";
        case CLIPFAST_CPU_ERROR_INSTRUCTIONS: return "this CPU has not the instructions asked for";
        case CLIPFAST_CPU_ERROR_MEMORY: return "no memory for keys, values and scores";
    }
    return "unknown error";
}

int clipfast_cpu_attention(const clipfast_cpu_attention_args *args) {
    if (!valid(args)) return CLIPFAST_CPU_ERROR_ARGUMENT;
    const int instructions = args->instructions == CLIPFAST_CPU_BEST ? best() : args->instructions;
    if (!has(instructions)) return CLIPFAST_CPU_ERROR_INSTRUCTIONS;
#if defined(__x86_64__)
    if (instructions == CLIPFAST_CPU_AVX512) return clipfast_cpu_attention_avx512(*args);
    if (instructions == CLIPFAST_CPU_AVX2) return clipfast_cpu_attention_avx2(*args);
#endif
    return clipfast_cpu_attention_baseline(*args);
}
