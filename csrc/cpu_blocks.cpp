// Residual attention blocks on a CPU in one call: their operators one after the other, some sequences at a time.
//
// Either all threads share each operator, or, where sequences are many enough and divide well, each thread takes
// some of them through all blocks and waits for nobody (`by_themselves`).
// With an index, the last block computes one row of each sequence, as cpu_attention_pool.cpp does, all threads together.
//
// What is computed in between of all rows stays in memory of a bounded size, whatever the batch, and is in the cache where it
// is read. Of the pooled rows, one a sequence, it is all there at once.
#include <cstring>
#include <initializer_list>

#include "clipfast_cpu.h"
#include "cpu_memory.h"
#include "cpu_vectors.h"

namespace {

// rows that pass together, unless one sequence has more: as many as `clipfast_cpu_linear` copies at a time
constexpr int64_t TOGETHER = 1024;
// and of a thread that takes sequences of its own: enough that making a weight's panels is a small part of the work
constexpr int64_t FEWEST = 256;
// Rows of each thread from which on threads take sequences of their own, if none has UNEVEN percent more than its share.
// ViT-B/32, two threads, AMD EPYC (Zen 4): 1 image each 2 % slower so, 2 images as fast and 9 % faster where another
// program disturbed one core, 8 images and 16 captions 1 to 2 % faster.
constexpr int64_t ALONE = 96;
constexpr int64_t UNEVEN = 3;

// bytes of a number
int64_t itemsize(const clipfast_cpu_block_args &args) { return args.dtype == CLIPFAST_CPU_BFLOAT16 ? 2 : 4; }

// Where in memory everything of some sequences is. The hidden rows lie where the joint projection was.
struct Between {
    int64_t attended; // bytes from the start to the result of attention
    int64_t offsets;
    int64_t bytes;

    Between(const clipfast_cpu_block_args &args, int64_t rows, int64_t sequences) {
        const int64_t widest = 3 * args.width > args.hidden ? 3 * args.width : args.hidden;
        attended = up(rows * widest * itemsize(args), 64);
        offsets = attended + up(rows * args.width * itemsize(args), 64);
        bytes = offsets + 4 * (sequences + 1);
    }
};

// of `rows` rows, with neither bias nor LayerNorm
clipfast_cpu_linear_args linear(const clipfast_cpu_block_args &args, int64_t rows, const void *weight, int32_t layout) {
    clipfast_cpu_linear_args call = {};
    call.struct_size = sizeof call;
    call.weight = weight;
    call.layout = layout;
    call.rows = rows;
    call.dtype = args.dtype;
    call.threads = args.threads;
    call.instructions = args.instructions;
    return call;
}

// What follows attention: x + out_proj(attended), and the MLP of that.
int run_rest(const clipfast_cpu_block_args &args, int64_t rows, const void *attended, const void *x, void *hidden,
             void *out) {
    auto to_out = linear(args, rows, args.out_weight, args.out_layout);
    to_out.x = attended;
    to_out.bias = args.out_bias;
    to_out.residual = x;
    to_out.out = out;
    to_out.terms = to_out.columns = args.width;

    auto to_hidden = linear(args, rows, args.fc1_weight, args.fc1_layout);
    to_hidden.x = out;
    to_hidden.norm_weight = args.norm_2_weight;
    to_hidden.norm_bias = args.norm_2_bias;
    to_hidden.eps = args.norm_2_eps;
    to_hidden.bias = args.fc1_bias;
    to_hidden.activation = args.activation;
    to_hidden.out = hidden;
    to_hidden.terms = args.width;
    to_hidden.columns = args.hidden;

    auto from_hidden = linear(args, rows, args.fc2_weight, args.fc2_layout);
    from_hidden.x = hidden;
    from_hidden.bias = args.fc2_bias;
    // in place: each number of the residual is read by who writes the result over it, just before
    from_hidden.residual = from_hidden.out = out;
    from_hidden.terms = args.hidden;
    from_hidden.columns = args.width;

    int code = CLIPFAST_CPU_OK;
    for (const auto *call : {&to_out, &to_hidden, &from_hidden})
        if (code == CLIPFAST_CPU_OK) code = clipfast_cpu_linear(call);
    return code;
}

// Some sequences through a block. x and out are at their first row.
int run_block(const clipfast_cpu_block_args &args, const int32_t *offsets, int64_t sequences, const void *x, void *out,
              char *memory) {
    const int64_t rows = offsets[sequences] - offsets[0], width = args.width;
    const Between at(args, rows, sequences);
    void *const qkv = memory, *const hidden = memory, *const attended = memory + at.attended;
    int32_t *const own = reinterpret_cast<int32_t *>(memory + at.offsets);
    for (int64_t i = 0; i <= sequences; i++) own[i] = offsets[i] - offsets[0];

    auto to_qkv = linear(args, rows, args.qkv_weight, args.qkv_layout);
    to_qkv.x = x;
    to_qkv.norm_weight = args.norm_1_weight;
    to_qkv.norm_bias = args.norm_1_bias;
    to_qkv.eps = args.norm_1_eps;
    to_qkv.bias = args.qkv_bias;
    to_qkv.out = qkv;
    to_qkv.terms = width;
    to_qkv.columns = 3 * width;

    clipfast_cpu_attention_args attend = {};
    attend.struct_size = sizeof attend;
    attend.qkv = qkv;
    attend.out = attended;
    attend.offsets = own;
    attend.sequences = sequences;
    attend.heads = args.heads;
    attend.width = int32_t(width / args.heads);
    attend.dtype = args.dtype;
    attend.causal = args.causal;
    attend.threads = args.threads;
    attend.instructions = args.instructions;
    attend.scale = args.scale;

    int code = clipfast_cpu_linear(&to_qkv);
    if (code == CLIPFAST_CPU_OK) code = clipfast_cpu_attention(&attend);
    return code == CLIPFAST_CPU_OK ? run_rest(args, rows, attended, x, hidden, out) : code;
}

// Sequences [first, last) through all blocks, `most` rows at a time: about as many each time, so that the last are no
// remainder.
int run_sequences(const clipfast_cpu_blocks_args &args, int64_t threads, int64_t most, int64_t first, int64_t last) {
    static thread_local Memory kept;
    const clipfast_cpu_block_args &any = args.blocks[0];
    const int32_t *const offsets = any.offsets;
    const int64_t row = any.width * itemsize(any), total = offsets[last] - offsets[first];
    if (total == 0) return CLIPFAST_CPU_OK; // a thread's share may be none: 39 equal sequences on 40 threads
    const int64_t goal = units(total, units(total, most)); // of rows
    while (first < last) {
        const int64_t start = offsets[first];
        int64_t end = first + 1;
        while (end < last && offsets[end + 1] - start <= most && offsets[end] - start + offsets[end + 1] - start <= 2 * goal)
            end++;
        for (int64_t i = 0; i < args.count && offsets[end] > start; i++) {
            clipfast_cpu_block_args block = args.blocks[i];
            block.threads = int32_t(threads);
            char *const memory =
                static_cast<char *>(kept.reserve(Between(block, offsets[end] - start, end - first).bytes));
            if (memory == nullptr) return CLIPFAST_CPU_ERROR_MEMORY;
            const int code = run_block(block, offsets + first, end - first, static_cast<const char *>(block.x) + start * row,
                                  static_cast<char *>(block.out) + start * row, memory);
            if (code != CLIPFAST_CPU_OK) return code;
        }
        first = end;
    }
    return CLIPFAST_CPU_OK;
}

// The last block, of one row of each sequence.
int run_pooled(const clipfast_cpu_block_args &args, const int64_t *index) {
    static thread_local Memory kept;
    const int64_t row = args.width * itemsize(args);
    const int64_t of_rows = up(args.sequences * row, 64);
    char *const attended = static_cast<char *>(kept.reserve(2 * of_rows + args.sequences * args.hidden * itemsize(args)));
    if (attended == nullptr) return CLIPFAST_CPU_ERROR_MEMORY;
    char *const residual = attended + of_rows, *const hidden = residual + of_rows;
    // a third of the joint projection
    const auto part = [&](const void *joint, int64_t which, int64_t bytes) {
        return joint == nullptr ? nullptr : static_cast<const char *>(joint) + which * bytes;
    };
    clipfast_cpu_attention_pool_args pool = {};
    pool.struct_size = sizeof pool;
    pool.tokens = args.x;
    pool.index = index;
    pool.norm_weight = args.norm_1_weight;
    pool.norm_bias = args.norm_1_bias;
    pool.eps = args.norm_1_eps;
    pool.offsets = args.offsets;
    pool.q_weight = part(args.qkv_weight, 0, args.width * row);
    pool.k_weight = part(args.qkv_weight, 1, args.width * row);
    pool.v_weight = part(args.qkv_weight, 2, args.width * row);
    pool.q_bias = part(args.qkv_bias, 0, row);
    pool.v_bias = part(args.qkv_bias, 2, row);
    pool.out = attended;
    pool.sequences = args.sequences;
    pool.terms = pool.inner = args.width;
    pool.heads = args.heads;
    pool.dtype = args.dtype;
    pool.threads = args.threads;
    pool.instructions = args.instructions;
    const int code = clipfast_cpu_attention_pool(&pool);
    if (code != CLIPFAST_CPU_OK) return code;
    for (int64_t i = 0; i < args.sequences; i++)
        memcpy(residual + i * row, static_cast<const char *>(args.x) + index[i] * row, row);
    return run_rest(args, args.sequences, attended, residual, hidden, args.out);
}

// first sequence of a thread, if each has sequences of its own, of about as many rows
int64_t first_of(const clipfast_cpu_block_args &args, int64_t thread) {
    const int64_t goal = int64_t(args.offsets[args.sequences]) * thread / args.threads;
    int64_t i = 0;
    while (i < args.sequences && int64_t(args.offsets[i]) + args.offsets[i + 1] < 2 * goal) i++;
    return thread == args.threads ? args.sequences : i;
}

// Do threads each take sequences of their own through the blocks? They wait for nobody then, and read only what they
// wrote.
bool by_themselves(const clipfast_cpu_block_args &args) {
    const int64_t total = args.offsets[args.sequences];
    if (args.threads == 1 || total < ALONE * args.threads) return false;
    int64_t most = 0;
    for (int64_t thread = 0; thread < args.threads; thread++) {
        const int64_t rows = args.offsets[first_of(args, thread + 1)] - args.offsets[first_of(args, thread)];
        most = rows > most ? rows : most;
    }
    return most * args.threads * 100 <= total * (100 + UNEVEN);
}

// Blocks [0, count), each of all rows.
int run_blocks(const clipfast_cpu_blocks_args &args) {
    if (args.count == 0) return CLIPFAST_CPU_OK;
    const clipfast_cpu_block_args &any = args.blocks[0];
    if (!by_themselves(any)) return run_sequences(args, any.threads, TOGETHER, 0, any.sequences);
    // each thread has memory of its own for them: the more there are, the fewer rows
    const int64_t most = TOGETHER / any.threads < FEWEST ? FEWEST : TOGETHER / any.threads;
    int code = CLIPFAST_CPU_OK;
#pragma omp parallel for num_threads(any.threads) schedule(static, 1)
    for (int64_t thread = 0; thread < any.threads; thread++) {
        const int found = run_sequences(args, 1, most, first_of(any, thread), first_of(any, thread + 1));
        if (found != CLIPFAST_CPU_OK) {
#pragma omp atomic write
            code = found;
        }
    }
    return code;
}

bool valid(const clipfast_cpu_block_args &args) {
    return args.struct_size == sizeof args && args.sequences >= 0 && args.width > 0 && args.hidden > 0 && args.heads > 0 &&
           args.width % args.heads == 0 && args.threads > 0 &&
           (args.dtype == CLIPFAST_CPU_FLOAT32 || args.dtype == CLIPFAST_CPU_BFLOAT16) &&
           (args.sequences == 0 || (args.x != nullptr && args.out != nullptr && args.offsets != nullptr));
}

// is `b` a block that may follow on `a`?
bool follows(const clipfast_cpu_block_args &a, const clipfast_cpu_block_args &b) {
    return b.x == a.out && b.x != b.out && b.offsets == a.offsets && b.sequences == a.sequences && b.width == a.width &&
           b.dtype == a.dtype && b.threads == a.threads;
}

} // namespace

int clipfast_cpu_blocks(const clipfast_cpu_blocks_args *args) {
    if (args == nullptr || args->struct_size != sizeof *args || args->count < 0 ||
        (args->count > 0 && args->blocks == nullptr))
        return CLIPFAST_CPU_ERROR_ARGUMENT;
    for (int64_t i = 0; i < args->count; i++)
        if (!valid(args->blocks[i]) || (i > 0 && !follows(args->blocks[i - 1], args->blocks[i])))
            return CLIPFAST_CPU_ERROR_ARGUMENT;
    if (args->index != nullptr && (args->count == 0 || args->blocks[args->count - 1].qkv_layout != CLIPFAST_CPU_ROWS))
        return CLIPFAST_CPU_ERROR_ARGUMENT;
    if (args->count == 0 || args->blocks[0].sequences == 0) return CLIPFAST_CPU_OK;
    if (args->index == nullptr) return run_blocks(*args);
    const clipfast_cpu_block_args &last = args->blocks[args->count - 1];
    for (int64_t i = 0; i < last.sequences; i++)
        if (args->index[i] < last.offsets[i] || args->index[i] >= last.offsets[i + 1]) return CLIPFAST_CPU_ERROR_INDEX;
    clipfast_cpu_blocks_args before = *args;
    before.count--;
    const int code = run_blocks(before);
    return code == CLIPFAST_CPU_OK ? run_pooled(last, args->index) : code;
}
