// Residual attention blocks on a CPU in one call: their operators one after the other, some sequences at a time.
//
// Either all threads share each operator, or, where sequences are many enough and divide well, each thread takes
// some of them through all blocks and waits for nobody (`by_themselves`).
// With an index, the last block computes one row of each sequence, as cpu_attention_pool.cpp does, all threads together,
// and these rows are projected.
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
int64_t itemsize(const clipfast_cpu_blocks_args &args) { return args.dtype == CLIPFAST_CPU_BFLOAT16 ? 2 : 4; }

// Where in memory everything of some sequences is. The hidden rows lie where the joint projection was.
struct Scratch {
    int64_t attended; // bytes from the start to the result of attention
    int64_t offsets;
    int64_t bytes;

    Scratch(const clipfast_cpu_blocks_args &args, const clipfast_cpu_block_args &block, int64_t rows, int64_t sequences) {
        const int64_t widest = 3 * args.width > block.hidden ? 3 * args.width : block.hidden;
        attended = up(rows * widest * itemsize(args), 64);
        offsets = attended + up(rows * args.width * itemsize(args), 64);
        bytes = offsets + 4 * (sequences + 1);
    }
};

// Of `rows` rows on `threads` threads, with neither bias nor LayerNorm.   terms: of a row of x
clipfast_cpu_linear_args linear(const clipfast_cpu_blocks_args &args, int64_t threads, int64_t rows, const void *weight,
                                int32_t layout, int64_t columns, int64_t terms) {
    clipfast_cpu_linear_args call = {};
    call.struct_size = sizeof call;
    call.weight = weight;
    call.layout = layout;
    call.rows = rows;
    call.columns = columns;
    call.terms = terms;
    call.dtype = args.dtype;
    call.threads = int32_t(threads);
    call.instructions = args.instructions;
    return call;
}

// What follows attention: out = x + out_proj(attended), and the MLP of that. x may be out: each number of the residual is
// read by who writes the result over it, just before.
int run_rest(const clipfast_cpu_blocks_args &args, const clipfast_cpu_block_args &block, int64_t threads, int64_t rows,
             const void *attended, const void *x, void *hidden, void *out) {
    auto to_out = linear(args, threads, rows, block.out_weight, block.out_layout, args.width, args.width);
    to_out.x = attended;
    to_out.bias = block.out_bias;
    to_out.residual = x;
    to_out.out = out;

    auto to_hidden = linear(args, threads, rows, block.fc1_weight, block.fc1_layout, block.hidden, args.width);
    to_hidden.x = out;
    to_hidden.norm_weight = block.norm_2_weight;
    to_hidden.norm_bias = block.norm_2_bias;
    to_hidden.eps = block.norm_2_eps;
    to_hidden.bias = block.fc1_bias;
    to_hidden.activation = block.activation;
    to_hidden.out = hidden;

    auto from_hidden = linear(args, threads, rows, block.fc2_weight, block.fc2_layout, args.width, block.hidden);
    from_hidden.x = hidden;
    from_hidden.bias = block.fc2_bias;
    from_hidden.residual = from_hidden.out = out;

    int code = CLIPFAST_CPU_OK;
    for (const auto *call : {&to_out, &to_hidden, &from_hidden})
        if (code == CLIPFAST_CPU_OK) code = clipfast_cpu_linear(call);
    return code;
}

// Some sequences through a block. x and out are at their first row, and may be the same.
int run_block(const clipfast_cpu_blocks_args &args, const clipfast_cpu_block_args &block, int64_t threads,
              const int32_t *offsets, int64_t sequences, const void *x, void *out, char *memory) {
    const int64_t rows = offsets[sequences] - offsets[0], width = args.width;
    const Scratch at(args, block, rows, sequences);
    void *const qkv = memory, *const hidden = memory, *const attended = memory + at.attended;
    int32_t *const own = reinterpret_cast<int32_t *>(memory + at.offsets);
    for (int64_t i = 0; i <= sequences; i++) own[i] = offsets[i] - offsets[0];

    auto to_qkv = linear(args, threads, rows, block.qkv_weight, block.qkv_layout, 3 * width, width);
    to_qkv.x = x;
    to_qkv.norm_weight = block.norm_1_weight;
    to_qkv.norm_bias = block.norm_1_bias;
    to_qkv.eps = block.norm_1_eps;
    to_qkv.bias = block.qkv_bias;
    to_qkv.out = qkv;

    clipfast_cpu_attention_args attend = {};
    attend.struct_size = sizeof attend;
    attend.qkv = qkv;
    attend.out = attended;
    attend.offsets = own;
    attend.sequences = sequences;
    attend.heads = block.heads;
    attend.width = int32_t(width / block.heads);
    attend.dtype = args.dtype;
    attend.causal = args.causal;
    attend.threads = int32_t(threads);
    attend.instructions = args.instructions;
    attend.scale = block.scale;

    int code = clipfast_cpu_linear(&to_qkv);
    if (code == CLIPFAST_CPU_OK) code = clipfast_cpu_attention(&attend);
    return code == CLIPFAST_CPU_OK ? run_rest(args, block, threads, rows, attended, x, hidden, out) : code;
}

// Sequences [first, last) through `count` blocks to `to`, `most` rows at a time: about as many each time, so that the last
// are no remainder. The first block reads x, each later one what the one before it left in `to`.
int run_sequences(const clipfast_cpu_blocks_args &args, int64_t count, char *to, int64_t threads, int64_t most, int64_t first,
                  int64_t last) {
    static thread_local Memory kept;
    const int32_t *const offsets = args.offsets;
    const int64_t row = args.width * itemsize(args), total = offsets[last] - offsets[first];
    if (total == 0) return CLIPFAST_CPU_OK; // a thread's share may be none: 39 equal sequences on 40 threads
    const int64_t goal = units(total, units(total, most)); // of rows
    while (first < last) {
        const int64_t start = offsets[first];
        int64_t end = first + 1;
        while (end < last && offsets[end + 1] - start <= most && offsets[end] - start + offsets[end + 1] - start <= 2 * goal)
            end++;
        for (int64_t i = 0; i < count && offsets[end] > start; i++) {
            const clipfast_cpu_block_args &block = args.blocks[i];
            char *const memory =
                static_cast<char *>(kept.reserve(Scratch(args, block, offsets[end] - start, end - first).bytes));
            if (memory == nullptr) return CLIPFAST_CPU_ERROR_MEMORY;
            const char *const from = i == 0 ? static_cast<const char *>(args.x) : to;
            const int code = run_block(args, block, threads, offsets + first, end - first, from + start * row,
                                       to + start * row, memory);
            if (code != CLIPFAST_CPU_OK) return code;
        }
        first = end;
    }
    return CLIPFAST_CPU_OK;
}

// first sequence of a thread, if each has sequences of its own, of about as many rows
int64_t first_of(const clipfast_cpu_blocks_args &args, int64_t thread) {
    const int64_t goal = int64_t(args.offsets[args.sequences]) * thread / args.threads;
    int64_t i = 0;
    while (i < args.sequences && int64_t(args.offsets[i]) + args.offsets[i + 1] < 2 * goal) i++;
    return thread == args.threads ? args.sequences : i;
}

// Do threads each take sequences of their own through the blocks? They wait for nobody then, and read only what they
// wrote.
bool by_themselves(const clipfast_cpu_blocks_args &args) {
    const int64_t total = args.offsets[args.sequences];
    if (args.threads == 1 || total < ALONE * args.threads) return false;
    int64_t most = 0;
    for (int64_t thread = 0; thread < args.threads; thread++) {
        const int64_t rows = args.offsets[first_of(args, thread + 1)] - args.offsets[first_of(args, thread)];
        most = rows > most ? rows : most;
    }
    return most * args.threads * 100 <= total * (100 + UNEVEN);
}

// x through the first `count` blocks to `to`, all rows.
int run_blocks(const clipfast_cpu_blocks_args &args, int64_t count, void *to) {
    char *const out = static_cast<char *>(to);
    if (!by_themselves(args)) return run_sequences(args, count, out, args.threads, TOGETHER, 0, args.sequences);
    // each thread has memory of its own for them: the more there are, the fewer rows
    const int64_t most = TOGETHER / args.threads < FEWEST ? FEWEST : TOGETHER / args.threads;
    int code = CLIPFAST_CPU_OK;
#pragma omp parallel for num_threads(args.threads) schedule(static, 1)
    for (int64_t thread = 0; thread < args.threads; thread++) {
        const int found = run_sequences(args, count, out, 1, most, first_of(args, thread), first_of(args, thread + 1));
        if (found != CLIPFAST_CPU_OK) {
#pragma omp atomic write
            code = found;
        }
    }
    return code;
}

// One row of each sequence of x through a block, and projected.
int run_pooled(const clipfast_cpu_blocks_args &args, const clipfast_cpu_block_args &block, const void *x) {
    static thread_local Memory kept;
    const int64_t row = args.width * itemsize(args), of_rows = up(args.sequences * row, 64);
    char *const attended =
        static_cast<char *>(kept.reserve(3 * of_rows + args.sequences * block.hidden * itemsize(args)));
    if (attended == nullptr) return CLIPFAST_CPU_ERROR_MEMORY;
    char *const residual = attended + of_rows, *const pooled = residual + of_rows, *const hidden = pooled + of_rows;
    // a third of the joint projection
    const auto part = [&](const void *joint, int64_t which, int64_t bytes) {
        return joint == nullptr ? nullptr : static_cast<const char *>(joint) + which * bytes;
    };
    clipfast_cpu_attention_pool_args pool = {};
    pool.struct_size = sizeof pool;
    pool.tokens = x;
    pool.index = args.index;
    pool.norm_weight = block.norm_1_weight;
    pool.norm_bias = block.norm_1_bias;
    pool.eps = block.norm_1_eps;
    pool.offsets = args.offsets;
    pool.q_weight = part(block.qkv_weight, 0, args.width * row);
    pool.k_weight = part(block.qkv_weight, 1, args.width * row);
    pool.v_weight = part(block.qkv_weight, 2, args.width * row);
    pool.q_bias = part(block.qkv_bias, 0, row);
    pool.v_bias = part(block.qkv_bias, 2, row);
    pool.out = attended;
    pool.sequences = args.sequences;
    pool.terms = pool.inner = args.width;
    pool.heads = block.heads;
    pool.dtype = args.dtype;
    pool.threads = args.threads;
    pool.instructions = args.instructions;
    int code = clipfast_cpu_attention_pool(&pool);
    if (code != CLIPFAST_CPU_OK) return code;
    for (int64_t i = 0; i < args.sequences; i++)
        memcpy(residual + i * row, static_cast<const char *>(x) + args.index[i] * row, row);
    void *const to = args.projection == nullptr ? args.out : pooled;
    code = run_rest(args, block, args.threads, args.sequences, attended, residual, hidden, to);
    if (code != CLIPFAST_CPU_OK || args.projection == nullptr) return code;
    auto project = linear(args, args.threads, args.sequences, args.projection, args.projection_layout, args.columns,
                          args.width);
    project.x = pooled;
    project.norm_weight = args.norm_weight;
    project.norm_bias = args.norm_bias;
    project.eps = args.norm_eps;
    project.out = args.out;
    return clipfast_cpu_linear(&project);
}

bool valid(const clipfast_cpu_blocks_args &args) {
    if (args.struct_size != sizeof args || args.count <= 0 || args.blocks == nullptr || args.sequences < 0 ||
        args.width <= 0 || args.threads <= 0 || args.columns < 0 ||
        !(args.dtype == CLIPFAST_CPU_FLOAT32 || args.dtype == CLIPFAST_CPU_BFLOAT16))
        return false;
    for (int64_t i = 0; i < args.count; i++) {
        const clipfast_cpu_block_args &block = args.blocks[i];
        if (block.struct_size != sizeof block || block.hidden <= 0 || block.heads <= 0 || args.width % block.heads != 0)
            return false;
    }
    if (args.index != nullptr && args.blocks[args.count - 1].qkv_layout != CLIPFAST_CPU_ROWS) return false;
    if (args.projection != nullptr &&
        (args.index == nullptr || args.norm_weight == nullptr || args.norm_bias == nullptr))
        return false;
    return args.sequences == 0 ||
           (args.x != nullptr && args.out != nullptr && args.offsets != nullptr && args.x != args.out &&
            (args.index == nullptr || args.count == 1 || (args.between != nullptr && args.between != args.x)));
}

} // namespace

int clipfast_cpu_blocks(const clipfast_cpu_blocks_args *args) {
    if (args == nullptr || !valid(*args)) return CLIPFAST_CPU_ERROR_ARGUMENT;
    if (args->sequences == 0) return CLIPFAST_CPU_OK;
    if (args->index == nullptr) return run_blocks(*args, args->count, args->out);
    for (int64_t i = 0; i < args->sequences; i++)
        if (args->index[i] < args->offsets[i] || args->index[i] >= args->offsets[i + 1]) return CLIPFAST_CPU_ERROR_INDEX;
    const clipfast_cpu_block_args &last = args->blocks[args->count - 1];
    if (args->count == 1) return run_pooled(*args, last, args->x);
    const int code = run_blocks(*args, args->count - 1, args->between);
    return code == CLIPFAST_CPU_OK ? run_pooled(*args, last, args->between) : code;
}
