// The entry points of libclipfast_cpu: arguments are checked here, once, and the form for this CPU is chosen.
#include <initializer_list>

#include "clipfast_cpu.h"

// One of each for each instruction set.
#define CLIPFAST_DECLARE(form)                                                            \
    int clipfast_cpu_attention_##form(const clipfast_cpu_attention_args &args);           \
    int clipfast_cpu_attention_pool_##form(const clipfast_cpu_attention_pool_args &args); \
    int clipfast_cpu_linear_##form(const clipfast_cpu_linear_args &args);                 \
    int clipfast_cpu_pack_##form(const clipfast_cpu_pack_args &args);                     \
    int clipfast_cpu_patch_embed_##form(const clipfast_cpu_patch_embed_args &args);       \
    int clipfast_cpu_peak_##form(const clipfast_cpu_peak_args &args);                     \
    int clipfast_cpu_read_##form(const clipfast_cpu_read_args &args);
CLIPFAST_DECLARE(baseline)
#if defined(__x86_64__)
CLIPFAST_DECLARE(avx2)
CLIPFAST_DECLARE(avx512)
CLIPFAST_DECLARE(avx512_bf16)
#endif

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
        case CLIPFAST_CPU_AVX512_BF16: return has(CLIPFAST_CPU_AVX512) && __builtin_cpu_supports("avx512bf16");
    }
    return false;
#else
    return instructions == CLIPFAST_CPU_BASELINE;
#endif
}

int best() {
    int instructions = CLIPFAST_CPU_AVX512_BF16;
    while (!has(instructions)) instructions--;
    return instructions;
}

bool known(int dtype) { return dtype == CLIPFAST_CPU_FLOAT32 || dtype == CLIPFAST_CPU_BFLOAT16; }

bool valid(const clipfast_cpu_attention_args &args) {
    return known(args.dtype) && args.sequences >= 0 && args.heads > 0 && args.width > 0 &&
           (args.sequences == 0 || (args.qkv != nullptr && args.out != nullptr && args.offsets != nullptr));
}

bool valid(const clipfast_cpu_attention_pool_args &args) {
    if (!known(args.dtype) || args.sequences < 0 || args.terms <= 0 || args.heads <= 0 || args.inner <= 0 ||
        args.inner % args.heads != 0)
        return false;
    if (args.sequences == 0) return true;
    for (const void *needed : {args.tokens, args.q_weight, args.k_weight, args.v_weight})
        if (needed == nullptr) return false;
    if (args.out == nullptr || args.offsets == nullptr) return false;
    // rows of tokens, normalised with them; or queries as they are handed in, and tokens too
    const bool rows = args.index != nullptr;
    if ((args.query == nullptr) != rows || (args.norm_weight != nullptr) != rows || (args.norm_bias != nullptr) != rows)
        return false;
    for (int64_t i = 0; i < args.sequences; i++) {
        if (args.offsets[i + 1] <= args.offsets[i]) return false;
        if (rows && (args.index[i] < args.offsets[i] || args.index[i] >= args.offsets[i + 1])) return false;
    }
    return true;
}

bool valid(const clipfast_cpu_linear_args &args) {
    return known(args.dtype) && args.rows >= 0 && args.columns >= 0 && args.terms >= 0 &&
           args.activation >= CLIPFAST_CPU_NONE && args.activation <= CLIPFAST_CPU_GELU &&
           (args.rows == 0 || args.columns == 0 ||
            (args.out != nullptr && (args.terms == 0 || (args.x != nullptr && args.weight != nullptr)))) &&
           (args.norm_weight == nullptr || args.norm_bias != nullptr) && args.layout >= CLIPFAST_CPU_ROWS &&
           args.layout <= CLIPFAST_CPU_PACKED;
}

bool valid(const clipfast_cpu_pack_args &args) {
    return known(args.dtype) && args.columns >= 0 && args.terms >= 0 && args.bytes != nullptr &&
           (args.packed == nullptr || args.columns == 0 || args.terms == 0 || args.weight != nullptr);
}

bool valid(const clipfast_cpu_patch_embed_args &args) {
    if (!known(args.dtype) || args.batch < 0 || args.channels <= 0 || args.height < 0 || args.width < 0 || args.patch <= 0 ||
        args.features <= 0 || (args.mean == nullptr) != (args.std == nullptr) ||
        (args.norm_weight == nullptr) != (args.norm_bias == nullptr))
        return false;
    if (args.batch == 0) return true;
    for (const void *needed : {args.images, args.weight, args.class_embedding, args.positional_embedding})
        if (needed == nullptr) return false;
    return args.out != nullptr;
}

bool valid(const clipfast_cpu_peak_args &args) {
    return known(args.dtype) && args.steps >= 0 && args.flops != nullptr;
}

bool valid(const clipfast_cpu_read_args &args) {
    return args.bytes >= 0 && args.bytes % CLIPFAST_CPU_READ_BLOCK == 0 && args.ahead >= 0 &&
           (args.bytes == 0 || args.data != nullptr);
}

// forms: by number, from CLIPFAST_CPU_BASELINE on
template <typename Args, int N>
int run(const Args *args, int (*const (&forms)[N])(const Args &)) {
    if (args == nullptr || args->struct_size != sizeof *args || args->threads <= 0 || !valid(*args))
        return CLIPFAST_CPU_ERROR_ARGUMENT;
    const int instructions = args->instructions == CLIPFAST_CPU_BEST ? best() : args->instructions;
    if (!has(instructions)) return CLIPFAST_CPU_ERROR_INSTRUCTIONS;
    return forms[instructions - CLIPFAST_CPU_BASELINE](*args);
}

} // namespace

#if defined(__x86_64__)
#define CLIPFAST_FORMS(name) {name##_baseline, name##_avx2, name##_avx512, name##_avx512_bf16}
#else
#define CLIPFAST_FORMS(name) {name##_baseline}
#endif

int clipfast_cpu_best(void) { return best(); }

int clipfast_cpu_abi_version(void) { return CLIPFAST_CPU_ABI_VERSION; }

const char *clipfast_cpu_error_text(int code) {
    switch (code) {
        case CLIPFAST_CPU_OK: return "no error";
        case CLIPFAST_CPU_ERROR_ARGUMENT:
            return "a null pointer, a size out of range, an unknown dtype, activation or layout, or arguments of another "
                   "version";
        case CLIPFAST_CPU_ERROR_INSTRUCTIONS: return "this CPU has not the instructions asked for";
        case CLIPFAST_CPU_ERROR_MEMORY: return "no memory for what is computed in between";
        case CLIPFAST_CPU_ERROR_INDEX: return "each index must be a row of its own sequence, and no sequence empty";
    }
    return "unknown error";
}

int clipfast_cpu_attention(const clipfast_cpu_attention_args *args) {
    return run(args, CLIPFAST_FORMS(clipfast_cpu_attention));
}

int clipfast_cpu_attention_pool(const clipfast_cpu_attention_pool_args *args) {
    return run(args, CLIPFAST_FORMS(clipfast_cpu_attention_pool));
}

int clipfast_cpu_linear(const clipfast_cpu_linear_args *args) { return run(args, CLIPFAST_FORMS(clipfast_cpu_linear)); }

int clipfast_cpu_pack(const clipfast_cpu_pack_args *args) { return run(args, CLIPFAST_FORMS(clipfast_cpu_pack)); }

int clipfast_cpu_patch_embed(const clipfast_cpu_patch_embed_args *args) {
    return run(args, CLIPFAST_FORMS(clipfast_cpu_patch_embed));
}

int clipfast_cpu_read(const clipfast_cpu_read_args *args) { return run(args, CLIPFAST_FORMS(clipfast_cpu_read)); }

int clipfast_cpu_peak(const clipfast_cpu_peak_args *args) { return run(args, CLIPFAST_FORMS(clipfast_cpu_peak)); }
