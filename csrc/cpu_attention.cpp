// Softmax attention of packed rows on a CPU, compiled once for each instruction set (CMakeLists.txt).
//
// One task is one head of one sequence. Its keys are transposed and its values laid out in float32, which the caches
// hold at CLIP's lengths; then, for a block of queries at a time: scores, softmax, product with the values, all in
// float32 whatever the type of the rows.
#include <cstdlib>

#include "clipfast_cpu.h"
#include "cpu_vectors.h"

namespace {

// sums of one product in registers: 6 x 4 vectors of 32, or 6 x 2 of 16
constexpr int ACROSS = LANES == 16 ? 4 : 2;
constexpr int DOWN = 6;    // queries that are multiplied together
constexpr int BLOCK = 48;  // queries whose scores exist at a time
constexpr int CHAIN = 128; // keys summed in one chain: longer ones would round more than PyTorch's
constexpr int TURNS = 16;  // in which a thread takes its tasks, if there are so many

// n values as float32, then zeros up to a multiple of LANES
template <typename T>
void load_row(const T *from, float *to, int n) {
    for (int i = 0; i < n; i += LANES) store(to + i, load_some(from + i, n - i));
}

template <typename T>
void store_row(T *to, const float *from, int n, float factor) {
    for (int i = 0; i < n; i += LANES) store_some(to + i, load(from + i) * factor, n - i);
}

// c[R][C * LANES] = (or +=) a[R][k] . b[k][C * LANES]
template <int R, int C>
void product(const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, int k, bool add) {
    Floats sums[R][C] = {};
    for (int i = 0; i < k; i++) {
        Floats row[C];
        for (int j = 0; j < C; j++) row[j] = load(b + i * ldb + LANES * j);
        for (int r = 0; r < R; r++) {
            const float x = a[r * lda + i];
            for (int j = 0; j < C; j++) sums[r][j] += x * row[j];
        }
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < C; j++) {
            float *to = c + r * ldc + LANES * j;
            store(to, add ? load(to) + sums[r][j] : sums[r][j]);
        }
}

template <int C>
void product_of_columns(int n, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, int k,
                        bool add) {
    for (; n >= DOWN; n -= DOWN, a += DOWN * lda, c += DOWN * ldc) product<DOWN, C>(a, lda, b, ldb, c, ldc, k, add);
    switch (n) {
        case 5: return product<5, C>(a, lda, b, ldb, c, ldc, k, add);
        case 4: return product<4, C>(a, lda, b, ldb, c, ldc, k, add);
        case 3: return product<3, C>(a, lda, b, ldb, c, ldc, k, add);
        case 2: return product<2, C>(a, lda, b, ldb, c, ldc, k, add);
        case 1: return product<1, C>(a, lda, b, ldb, c, ldc, k, add);
    }
}

// c[n][columns] = (or +=) a[n][k] . b[k][columns]; columns a multiple of LANES
void product(int n, int64_t columns, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc,
             int k, bool add = false) {
    int64_t j = 0;
    for (; j + ACROSS * LANES <= columns; j += ACROSS * LANES)
        product_of_columns<ACROSS>(n, a, lda, b + j, ldb, c + j, ldc, k, add);
    for (; ACROSS > 2 && j + 2 * LANES <= columns; j += 2 * LANES)
        product_of_columns<2>(n, a, lda, b + j, ldb, c + j, ldc, k, add);
    for (; j < columns; j += LANES) product_of_columns<1>(n, a, lda, b + j, ldb, c + j, ldc, k, add);
}

// scores[0, seen) -> exp(score - greatest), scores[seen, columns) -> 0; columns a multiple of LANES
// Returns 1 / their sum.
float softmax(float *scores, int64_t seen, int64_t columns) {
    for (int64_t j = seen; j < columns; j++) scores[j] = -__builtin_inff();
    Floats greatest = load(scores);
    for (int64_t j = LANES; j < columns; j += LANES) {
        const Floats x = load(scores + j);
        greatest = x > greatest ? x : greatest;
    }
    greatest = across_lanes<LANES / 2>(greatest, [](Floats a, Floats b) { return a > b ? a : b; });
    Floats sums = {};
    for (int64_t j = 0; j < columns; j += LANES) {
        const Floats weight = exp_of_negative(load(scores + j) - greatest);
        store(scores + j, weight);
        sums += weight;
    }
    return 1 / across_lanes<LANES / 2>(sums, [](Floats a, Floats b) { return a + b; })[0];
}

struct Sizes {
    int64_t longest;
    int heads, width;
    float scale;
    bool causal;

    int64_t row() const { return 3LL * heads * width; }
    int64_t floats() const {
        const int64_t keys = padded(longest), wide = padded(width);
        return width * keys + longest * wide + BLOCK * (2 * wide + keys) + LANES * wide;
    }
};

// one head of one sequence, its queries [first, last).   memory: Sizes::floats
template <typename T>
void attend(const T *qkv, T *out, int length, int head, int first, int last, const Sizes &sizes, float *memory) {
    const int width = sizes.width, heads = sizes.heads;
    const int64_t keys = padded(length), wide = padded(width), row = sizes.row();
    float *const transposed = memory;                // [width][keys]
    float *const values = transposed + width * keys; // [length][wide]
    float *const queries = values + length * wide;   // [BLOCK][wide]
    float *const sums = queries + BLOCK * wide;      // [BLOCK][wide]
    float *const scores = sums + BLOCK * wide;       // [BLOCK][keys]
    float *const group = scores + BLOCK * keys;      // [LANES][wide]
    const T *const query = qkv + int64_t(head) * width;
    const T *const key = query + int64_t(heads) * width;
    const T *const value = key + int64_t(heads) * width;
    const int seen = sizes.causal ? last : length;

    for (int j = 0; j < seen; j += LANES) {
        for (int i = 0; i < LANES; i++) {
            if (j + i < seen)
                load_row(key + (j + i) * row, group + i * wide, width);
            else
                memset(group + i * wide, 0, 4 * wide);
        }
        for (int d = 0; d < width; d += SQUARE)
            for (int i = 0; i < LANES; i += SQUARE) {
                Row rows[SQUARE];
#pragma GCC unroll 8
                for (int k = 0; k < SQUARE; k++) memcpy(&rows[k], group + (i + k) * wide + d, sizeof rows[k]);
                transpose(rows);
#pragma GCC unroll 8
                for (int k = 0; k < SQUARE; k++)
                    if (d + k < width) memcpy(transposed + (d + k) * keys + j + i, &rows[k], sizeof rows[k]);
            }
    }
    for (int j = 0; j < seen; j++) load_row(value + j * row, values + j * wide, width);

    for (int start = first; start < last; start += BLOCK) {
        const int n = last - start < BLOCK ? last - start : BLOCK;
        const int64_t columns = padded(sizes.causal ? start + n : length);
        const int visible = sizes.causal ? start + n : length;
        for (int i = 0; i < n; i++) {
            float *const to = queries + i * wide;
            load_row(query + (start + i) * row, to, width);
            for (int d = 0; d < wide; d += LANES) store(to + d, load(to + d) * sizes.scale);
        }
        product(n, columns, queries, wide, transposed, keys, scores, keys, width);
        float inverse[BLOCK];
        for (int i = 0; i < n; i++)
            inverse[i] = softmax(scores + i * keys, sizes.causal ? start + i + 1 : length, columns);
        for (int k = 0; k < visible; k += CHAIN)
            product(n, wide, scores + k, keys, values + k * wide, wide, sums, wide,
                    visible - k < CHAIN ? visible - k : CHAIN, k > 0);
        for (int i = 0; i < n; i++)
            store_row(out + ((start + i) * int64_t(heads) + head) * width, sums + i * wide, width, inverse[i]);
    }
}

template <typename T>
int attend_all(const clipfast_cpu_attention_args &args) {
    const T *const qkv = static_cast<const T *>(args.qkv);
    T *const out = static_cast<T *>(args.out);
    const int32_t *const offsets = args.offsets;
    Sizes sizes{0, args.heads, args.width, args.scale, args.causal != 0};
    for (int64_t i = 0; i < args.sequences; i++) {
        const int64_t length = offsets[i + 1] - offsets[i];
        sizes.longest = length > sizes.longest ? length : sizes.longest;
    }
    const int64_t pairs = args.sequences * args.heads;
    if (sizes.longest == 0 || pairs == 0) return 0;
    // one long sequence on many cores: several tasks share a head, each with some of its queries
    const int64_t blocks = (sizes.longest + BLOCK - 1) / BLOCK;
    int64_t parts = (args.threads + pairs - 1) / pairs;
    parts = parts < blocks ? parts : blocks;
    const int64_t tasks = pairs * parts;
    const int64_t together = 1 + tasks / (args.threads * int64_t(TURNS));
    int failed = 0;
#pragma omp parallel num_threads(args.threads)
    {
        float *const memory = static_cast<float *>(malloc(4 * sizes.floats()));
        if (memory == nullptr) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, together)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t sequence = task / (args.heads * parts), part = task % parts;
            const int head = int(task / parts % args.heads);
            const int64_t first = offsets[sequence], length = offsets[sequence + 1] - first;
            if (memory != nullptr)
                attend(qkv + first * sizes.row(), out + first * args.heads * args.width, int(length), head,
                       int(length * part / parts), int(length * (part + 1) / parts), sizes, memory);
        }
        free(memory);
    }
    return failed ? CLIPFAST_CPU_ERROR_MEMORY : 0;
}

} // namespace

int CLIPFAST_IN_THIS_FORM(clipfast_cpu_attention)(const clipfast_cpu_attention_args &args) {
    return args.dtype == CLIPFAST_CPU_BFLOAT16 ? attend_all<uint16_t>(args) : attend_all<float>(args);
}
