// Softmax attention of packed rows on a CPU, compiled once for each instruction set (CMakeLists.txt).
//
// One task is one head of one sequence. Its keys are transposed and its values laid out in float32, which the caches
// hold at CLIP's lengths; then, for a block of queries at a time: scores, softmax, product with the values. All that is
// in float32 whatever the type of the rows. A CPU that multiplies bfloat16 makes the scores so: each product of two is
// exact, and the sums are float32 there too. Weights of values are not rounded to bfloat16 for it.
#include <omp.h>

#include "clipfast_cpu.h"
#include "cpu_memory.h"
#include "cpu_products.h"

namespace {

// sums of one product in registers: 6 x 4 vectors of 32, or 6 x 2 of 16
constexpr int ACROSS = LANES == 16 ? 4 : 2;
constexpr int TALL = 6;        // queries, at most, that are multiplied together
constexpr int64_t BLOCK = 48;  // queries, at most, whose scores exist at a time
// the same in causal attention, where keys behind a block's last query are left out: with 48 rather than 12, 77 rows of
// 8 heads took 0.116 ms and not 0.100, 16 captions of 16 rows 0.164 and not 0.157 (AMD EPYC (Zen 4), one thread)
constexpr int64_t CAUSAL = 12;
constexpr int64_t CHAIN = 128; // steps summed in one chain: longer ones would round more than PyTorch's
constexpr int TURNS = 16;      // in which a thread takes its tasks, if there are so many

// one side of a product: rows, or registers, of words
struct Side {
    const uint32_t *at;
    int64_t apart; // of two rows or registers
    int64_t step;  // of two words of one
};

// where sums of products go, times `scale`; added to what is there, if `add`
struct Sums {
    float *at;
    int64_t apart; // of two rows
    float scale;
    bool add;
};

// R rows with C registers
template <typename Type, int R, int C>
void tile(const Side &x, const Side &y, int64_t steps, const Sums &to) {
    Floats sums[R][C] = {};
    for (int64_t i = 0; i < steps; i++) {
        Terms<Type> column[C];
        for (int c = 0; c < C; c++)
            column[c] = Terms<Type>::load(reinterpret_cast<const Type *>(y.at + c * y.apart + i * y.step));
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const Terms<Type> row = {Words{} + x.at[r * x.apart + i]};
            for (int c = 0; c < C; c++) add_product(sums[r][c], row, column[c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) {
            float *const place = to.at + r * to.apart + c * LANES;
            store(place, (to.add ? load(place) + sums[r][c] : sums[r][c]) * to.scale);
        }
}

template <typename Type, int C, int R = TALL>
void tile_of(int64_t rows, const Side &x, const Side &y, int64_t steps, const Sums &to) {
    if constexpr (R > 1)
        if (rows < R) return tile_of<Type, C, R - 1>(rows, x, y, steps, to);
    tile<Type, R, C>(x, y, steps, to);
}

// registers from `first` on, C at a time, with all rows in tiles of nearly one height. Returns the first that is left.
template <typename Type, int C>
int64_t tiles(int64_t first, int64_t rows, int64_t registers, const Side &x, const Side &y, int64_t steps,
              const Sums &to) {
    const int64_t count = units(rows, TALL);
    for (; first + C <= registers; first += C)
        for (int64_t t = 0; t < count; t++) {
            const int64_t row = rows * t / count, end = rows * (t + 1) / count;
            tile_of<Type, C>(end - row, Side{x.at + row * x.apart, x.apart, x.step},
                             Side{y.at + first * y.apart, y.apart, y.step}, steps,
                             Sums{to.at + row * to.apart + first * LANES, to.apart, to.scale, to.add});
        }
    return first;
}

// to[rows][registers][LANES] = scale * x . y, in chains; rows of `to` are `apart`
template <typename Type>
void product(int64_t rows, int64_t registers, const Side &x, const Side &y, int64_t steps, float scale, float *to,
             int64_t apart) {
    for (int64_t start = 0; start < steps; start += CHAIN) {
        const int64_t n = least(steps - start, CHAIN);
        const Side of_x{x.at + start * x.step, x.apart, x.step}, of_y{y.at + start * y.step, y.apart, y.step};
        const Sums sums{to, apart, start + n == steps ? scale : 1, start > 0};
        int64_t first = tiles<Type, ACROSS>(0, rows, registers, of_x, of_y, n, sums);
        if (ACROSS > 2) first = tiles<Type, 2>(first, rows, registers, of_x, of_y, n, sums);
        tiles<Type, 1>(first, rows, registers, of_x, of_y, n, sums);
    }
}

// `bytes` bytes of n rows, transposed: [n / LANES][steps][LANES]; zeros fill up registers and steps
template <bool WIDEN>
void turn_rows(const char *rows, int64_t stride, int64_t n, int64_t bytes, int64_t steps, uint32_t *to) {
    constexpr int64_t EACH = WIDEN ? 2 : 1; // steps of a word
    for (int64_t row = 0; row < padded(n); row += SQUARE)
        for (int64_t word = 0; EACH * word < steps; word += SQUARE) {
            const char *const from = rows + row * stride + 4 * word;
            uint32_t *const place = to + row / LANES * steps * LANES + EACH * word * LANES + row % LANES;
            if (row + SQUARE <= n && 4 * (word + SQUARE) <= bytes) {
                turn_square<WIDEN>(from, stride, place);
            } else {
                char some[SQUARE][4 * SQUARE] = {};
                for (int64_t i = 0; i < SQUARE && row + i < n; i++)
                    memcpy(some[i], from + i * stride, least(bytes - 4 * word, 4 * SQUARE));
                turn_square<WIDEN>(some[0], 4 * SQUARE, place);
            }
        }
}

// scores[0, seen) -> exp(score - greatest), scores[seen, columns) -> 0; columns a multiple of LANES
// Returns 1 / their sum.
inline float softmax(float *scores, int64_t seen, int64_t columns) {
    const int64_t end = padded(seen);
    // a register at a time: a load of what was just stored number by number waits, and 16 captions of 16 rows took
    // 0.195 ms, not 0.145 (AMD EPYC (Zen 4), one thread)
    static constexpr Places lanes = swapped<0>(); // each its own number
    const Floats hidden = Floats{} - __builtin_inff(), partly = load(scores + end - LANES);
    store(scores + end - LANES, lanes.vector() < int32_t(seen - end + LANES) ? partly : hidden);
    Floats greatest = load(scores);
    for (int64_t j = LANES; j < end; j += LANES) {
        const Floats x = load(scores + j);
        greatest = x > greatest ? x : greatest;
    }
    greatest = across_lanes<LANES / 2>(greatest, [](Floats a, Floats b) { return a > b ? a : b; });
    Floats sums = {};
    for (int64_t j = 0; j < end; j += LANES) {
        const Floats weight = exp_of_negative(load(scores + j) - greatest);
        store(scores + j, weight);
        sums += weight;
    }
    for (int64_t j = end; j < columns; j += LANES) store(scores + j, Floats{});
    return 1 / across_lanes<LANES / 2>(sums, [](Floats a, Floats b) { return a + b; })[0];
}

// What attention of one type of rows is about, and the memory of a thread.
template <typename T>
struct Sizes {
    int64_t longest, heads, width;
    float scale;
    bool causal;

    int64_t row() const { return 3 * heads * width; }
    int64_t bytes() const { return width * int64_t(sizeof(T)); }
    // of a score: words, or bfloat16 that is widened
    int64_t steps() const { return up(units(bytes(), 4), SQUARE) * (WIDENS<T> ? 2 : 1); }
    int64_t wide() const { return padded(width); }
    int64_t words() const {
        const int64_t keys = padded(longest);
        return apart(4 * (keys * steps() + keys * wide() + BLOCK * (up(steps(), LANES) + wide() + keys))) / 4;
    }
};

// one head of one sequence, its queries [first, last).   memory: Sizes::words
template <typename T>
void attend(const T *qkv, T *out, int64_t length, int64_t head, int64_t first, int64_t last, const Sizes<T> &sizes,
            uint32_t *memory) {
    const int64_t width = sizes.width, heads = sizes.heads, row = sizes.row();
    const int64_t stride = row * int64_t(sizeof(T)); // bytes from a row to the next
    const int64_t keys = padded(length), steps = sizes.steps(), wide = sizes.wide();
    uint32_t *const transposed = memory;                                         // [keys / LANES][steps][LANES]
    float *const values = reinterpret_cast<float *>(transposed + keys * steps);  // [length][wide]
    float *const scores = values + keys * wide;                                  // [BLOCK][keys]
    float *const sums = scores + BLOCK * keys;                                   // [BLOCK][wide]
    uint32_t *const queries = reinterpret_cast<uint32_t *>(sums + BLOCK * wide); // [BLOCK][steps]
    const T *const query = qkv + head * width;
    const T *const key = query + heads * width;
    const T *const value = key + heads * width;

    // queries that are whole steps are read where they are: 1 image of 50 rows in 107 us, not 110 (AMD EPYC (Zen 4))
    const bool whole = !WIDENS<T> && sizes.bytes() == 4 * steps && reinterpret_cast<uintptr_t>(qkv) % 4 == 0;
    const int64_t used = sizes.causal ? last : length;
    turn_rows<WIDENS<T>>(reinterpret_cast<const char *>(key), stride, used, sizes.bytes(), steps, transposed);
    for (int64_t j = 0; j < used; j++)
        for (int64_t d = 0; d < width; d += LANES)
            store(values + j * wide + d, load_some(value + j * row + d, width - d));

    const int64_t blocks = units(last - first, sizes.causal ? CAUSAL : BLOCK);
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t start = first + (last - first) * block / blocks;
        const int64_t end = first + (last - first) * (block + 1) / blocks;
        const int64_t n = end - start, visible = sizes.causal ? end : length, columns = padded(visible);
        const char *const from = reinterpret_cast<const char *>(query + start * row);
        Side x{reinterpret_cast<const uint32_t *>(from), stride / 4, 1};
        if (!whole) {
            for (int64_t i = 0; i < n; i++)
                copy_row<T>(from + i * stride, sizes.bytes(), steps, queries + i * steps);
            x = Side{queries, steps, 1};
        }
        product<Stepped<T>>(n, columns / LANES, x, Side{transposed, steps * LANES, LANES}, steps, sizes.scale, scores,
                            keys);
        float inverse[BLOCK];
        for (int64_t i = 0; i < n; i++)
            inverse[i] = softmax(scores + i * keys, sizes.causal ? start + i + 1 : length, columns);
        product<float>(n, wide / LANES, Side{reinterpret_cast<const uint32_t *>(scores), keys, 1},
                       Side{reinterpret_cast<const uint32_t *>(values), LANES, wide}, visible, 1, sums, wide);
        for (int64_t i = 0; i < n; i++)
            for (int64_t d = 0; d < width; d += LANES)
                store_some(out + ((start + i) * heads + head) * width + d, load(sums + i * wide + d) * inverse[i],
                           width - d);
    }
}

template <typename T>
int attend_all(const clipfast_cpu_attention_args &args) {
    const T *const qkv = static_cast<const T *>(args.qkv);
    T *const out = static_cast<T *>(args.out);
    const int32_t *const offsets = args.offsets;
    Sizes<T> sizes{0, args.heads, args.width, args.scale, args.causal != 0};
    for (int64_t i = 0; i < args.sequences; i++) {
        const int64_t length = offsets[i + 1] - offsets[i];
        sizes.longest = length > sizes.longest ? length : sizes.longest;
    }
    const int64_t pairs = args.sequences * args.heads;
    if (sizes.longest == 0 || pairs == 0) return CLIPFAST_CPU_OK;
    // one long sequence on many cores: several tasks share a head, each with some of its queries
    const int64_t parts = least(units(args.threads, pairs), units(sizes.longest, BLOCK));
    const int64_t tasks = pairs * parts, together = 1 + tasks / (args.threads * int64_t(TURNS));
    static thread_local Memory kept;
    uint32_t *const memory = static_cast<uint32_t *>(kept.reserve(4 * args.threads * sizes.words()));
    if (memory == nullptr) return CLIPFAST_CPU_ERROR_MEMORY;
#pragma omp parallel num_threads(args.threads)
    {
        uint32_t *const mine = memory + omp_get_thread_num() * sizes.words();
#pragma omp for schedule(dynamic, together)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t sequence = task / (args.heads * parts), part = task % parts, head = task / parts % args.heads;
            const int64_t first = offsets[sequence], length = offsets[sequence + 1] - first;
            attend(qkv + first * sizes.row(), out + first * args.heads * args.width, length, head,
                   length * part / parts, length * (part + 1) / parts, sizes, mine);
        }
    }
    return CLIPFAST_CPU_OK;
}

} // namespace

int CLIPFAST_IN_THIS_FORM(clipfast_cpu_attention)(const clipfast_cpu_attention_args &args) {
    return args.dtype == CLIPFAST_CPU_BFLOAT16 ? attend_all<uint16_t>(args) : attend_all<float>(args);
}
