// A linear layer on a CPU, compiled once for each instruction set (CMakeLists.txt).
//
// A product as Goto and van de Geijn (2008) and BLIS order it. All threads copy rows of x beside one another, a chain
// of terms after the other. Then each makes panels of the weight, and multiplies all those rows by a panel in its first
// cache while the weight's next columns are on their way from memory. A few rows are multiplied by the weight as it is
// (cpu_few_rows.h). Nothing stays, unless the weight was packed before.
#include <atomic>
#include <omp.h>
#include <utility>

#include "cpu_few_rows.h"
#include "cpu_norm.h"

namespace {

// rows whose sums with a panel are in registers together: 6 x 2 of 16, 12 x 2 of 32
constexpr int TALL = LANES == 16 ? 12 : LANES == 8 ? 6 : 4;
constexpr int64_t GROUP = 64;   // columns, at most, that one task multiplies
constexpr int64_t PART = 256;   // rows, at most: a chain of them, and their sums, stay in the second cache
constexpr int64_t BLOCK = 1024; // rows, at most, that are copied before they are multiplied

// Do tiles make the next panel while they multiply by this one? Shuffles then go on beside multiplications: 50 rows of
// ViT-B's layers 95 -> 98 GFLOP/s (AMD EPYC (Zen 4), one core). With registers of 8 it was slower, 90 -> 85.
template <typename T>
constexpr bool MAKES_NEXT = LANES == 16 && !WIDENS<T>;

// a column of squares of the next panel
struct Squares {
    const char *weight;
    int64_t stride, words; // no words: no squares
    uint32_t *to;
};

// to[R][GROUP] = (or +=) x[R][steps] . panel[ACROSS][steps][LANES]; rows of x are CHAIN apart.   MAKES: squares too
template <typename T, int R, bool MAKES>
__attribute__((noinline)) void tile(const uint32_t *x, const uint32_t *panel, int64_t steps, float *to, bool add,
                                    Ahead &ahead, Squares squares) {
    typedef Stepped<T> Type;
    Floats sums[R][ACROSS] = {};
    for (int64_t i = 0; i < steps; i += UNROLLED) {
        ahead.turn();
        if constexpr (MAKES)
            if (i < squares.words)
                turn_square<false>(squares.weight + 4 * i, squares.stride, squares.to + i * LANES);
#pragma GCC unroll 8
        for (int j = 0; j < UNROLLED; j++) {
            Terms<Type> column[ACROSS];
            for (int v = 0; v < ACROSS; v++)
                column[v] = Terms<Type>::load(reinterpret_cast<const Type *>(panel + (v * steps + i + j) * LANES));
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                const Terms<Type> row = {Words{} + x[r * CHAIN + i + j]};
                for (int v = 0; v < ACROSS; v++) add_product(sums[r][v], row, column[v]);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
        for (int v = 0; v < ACROSS; v++) {
            float *const place = to + r * GROUP + v * LANES;
            store(place, add ? load(place) + sums[r][v] : sums[r][v]);
        }
}

template <typename T, int R = TALL>
inline void tile_of(int64_t rows, const uint32_t *x, const uint32_t *panel, int64_t steps, float *to, bool add,
                    Ahead &ahead, Squares squares) {
    if constexpr (R > 1)
        if (rows < R) return tile_of<T, R - 1>(rows, x, panel, steps, to, add, ahead, squares);
    if constexpr (MAKES_NEXT<T>)
        if (squares.words > 0) return tile<T, R, true>(x, panel, steps, to, add, ahead, squares);
    return tile<T, R, false>(x, panel, steps, to, add, ahead, squares);
}

Norm norm_of(const clipfast_cpu_linear_args &args) {
    return {static_cast<const float *>(args.norm_weight), static_cast<const float *>(args.norm_bias), args.eps};
}

// Rows of x, copied: [chains][count][CHAIN].
struct Rows {
    int64_t first, count; // of all rows
    const uint32_t *x;
    int64_t chain; // words from one to the next
};

// A panel of a group over one chain; there is none if the group is -1.
struct Place {
    int64_t group, chain, panel;
};

// Memory for two panels.
struct Panels {
    uint32_t *now, *next;
    int64_t done; // words of the one at `now`, made while the last was multiplied
};

template <typename T>
struct Product {
    const clipfast_cpu_linear_args &args;
    const Chains<T> chains;
    const int64_t groups;
    const bool few; // are rows so few that rows of the weight are read as they are?

    explicit Product(const clipfast_cpu_linear_args &args)
        : args(args), chains(args.terms), groups(groups_of(args)),
          few(SERVES_FEW<T> && args.rows <= FEW && args.layout == CLIPFAST_CPU_ROWS) {}

    // of panels: a multiple of the threads, so that each has as many, unless there are fewer panels
    static int64_t groups_of(const clipfast_cpu_linear_args &args) {
        const int64_t panels = panels_in(args.columns), most = GROUP / PANEL;
        return least(panels, up(units(panels, most), args.threads));
    }

    int64_t first(int64_t group) const { return panels_in(args.columns) * group / groups; }
    int64_t columns(int64_t panel) const { return least(args.columns - panel * PANEL, PANEL); }

    // a panel's part of the weight: [columns, terms], [terms, columns], or made by `pack`
    const char *weight(int64_t panel, int64_t chain) const {
        const char *const weight = static_cast<const char *>(args.weight);
        if (args.layout == CLIPFAST_CPU_PACKED)
            return weight + 4 * PANEL * (panel * chains.all_words() + chain * chains.length);
        if (args.layout == CLIPFAST_CPU_TRANSPOSED)
            return weight + 4 * chain * chains.length * args.columns + panel * PANEL * int64_t(sizeof(T));
        return weight + panel * PANEL * chains.bytes + 4 * chain * chains.length;
    }

    // the panel as `tile` reads it, at `memory` if it is not there already.   done: words of it that are
    const uint32_t *made(int64_t panel, int64_t chain, uint32_t *memory, int64_t done) const {
        const char *const from = weight(panel, chain);
        const int64_t words = chains.words_of(chain), bytes = chains.bytes_of(chain);
        if (args.layout == CLIPFAST_CPU_ROWS)
            make_panel<WIDENS<T>>(from, chains.bytes, columns(panel), bytes, words, memory, done);
        else if (args.layout == CLIPFAST_CPU_TRANSPOSED)
            copy_panel<T>(reinterpret_cast<const T *>(from), args.columns, columns(panel), bytes / int64_t(sizeof(T)),
                          words * STEPS<T>, memory);
        else if (WIDENS<T>)
            widen_panel(reinterpret_cast<const uint32_t *>(from), words, memory);
        else
            return reinterpret_cast<const uint32_t *>(from);
        return memory;
    }

    // what is to be asked for in `turns` turns
    Ahead ahead(int64_t panel, int64_t chain, int64_t turns) const {
        const char *const from = weight(panel, chain);
        const int64_t bytes = chains.bytes_of(chain), one = sizeof(T);
        if (args.layout == CLIPFAST_CPU_PACKED) return Ahead(from, 1, 0, 4 * PANEL * chains.words_of(chain), turns);
        if (args.layout == CLIPFAST_CPU_TRANSPOSED)
            return Ahead(from, bytes / one, args.columns * one, columns(panel) * one, turns);
        return Ahead(from, columns(panel), chains.bytes, bytes, turns);
    }

    // the place after another, in group `next` if that was its group's last
    Place after(Place at, int64_t next) const {
        if (at.panel + 1 < first(at.group + 1)) return {at.group, at.chain, at.panel + 1};
        if (at.chain + 1 < chains.count) return {at.group, at.chain + 1, first(at.group)};
        return {next, 0, next < 0 ? 0 : first(next)};
    }

    // words that tiles of `words` steps can make of a panel: whole squares of it
    int64_t words_made(Place at, int64_t words) const {
        if (at.group < 0 || columns(at.panel) < PANEL) return 0;
        return least(chains.bytes_of(at.chain) / (4 * SQUARE) * SQUARE, words);
    }

    // one column of them
    Squares squares(Place at, int64_t column, int64_t words, uint32_t *to) const {
        return {weight(at.panel, at.chain) + column * chains.bytes, chains.bytes, words,
                to + column / LANES * chains.words_of(at.chain) * LANES + column % LANES};
    }

    // the panels of one group times some rows of x
    // next: the group whose weight is asked for meanwhile, or -1.   sums: [rows.count][GROUP]
    void multiply(int64_t group, int64_t next, const Rows &rows, Panels &panels, float *sums) const {
        const int64_t begin = first(group), end = first(group + 1), tiles = units(rows.count, TALL);
        // each tile makes a column of squares. Two columns where tiles are fewer: 16 rows 74 -> 70 GFLOP/s (Zen 4)
        const bool makes = MAKES_NEXT<T> && args.layout == CLIPFAST_CPU_ROWS && tiles >= PANEL / SQUARE;
        for (int64_t chain = 0; chain < chains.count; chain++) {
            const int64_t steps = chains.words_of(chain) * STEPS<T>, turns = tiles * steps / UNROLLED;
            const bool last = chain + 1 == chains.count;
            for (int64_t p = begin; p < end; p++) {
                const uint32_t *const panel = made(p, chain, panels.now, panels.done);
                const Place second = after({group, chain, p}, next);
                panels.done = makes ? words_made(second, steps) : 0;
                // what is made meanwhile was asked for before: asked for only now, 512 wide, 50 rows lost 3 %
                const bool two = makes && second.group >= 0;
                const Place asked_for = two ? after(second, second.group == group ? next : -1) : second;
                Ahead asked = asked_for.group >= 0 ? ahead(asked_for.panel, asked_for.chain, turns)
                                                   : Ahead(nullptr, 0, 0, 0, 1);
                float *const place = sums + (p - begin) * PANEL;
                for (int64_t t = 0; t < tiles; t++) {
                    const int64_t from = rows.count * t / tiles, to = rows.count * (t + 1) / tiles, column = t * SQUARE;
                    if (last) expect(p, rows.first + from, to - from);
                    const uint32_t *const x = rows.x + chain * rows.chain + from * CHAIN;
                    tile_of<T>(to - from, x, panel, steps, place + from * GROUP, chain > 0, asked,
                               panels.done > 0 && column < PANEL ? squares(second, column, panels.done, panels.next)
                                                                 : Squares{});
                }
                if (panels.done > 0) std::swap(panels.now, panels.next);
                if (last) finish(p, rows.first, rows.count, place);
            }
        }
    }

    // as `multiply`, for few rows: no panels
    void multiply_few(int64_t group, int64_t next, const Rows &rows, float *sums) const {
        const int64_t begin = first(group) * PANEL, end = least(first(group + 1) * PANEL, args.columns);
        const char *const weight = static_cast<const char *>(args.weight);
        for (int64_t c = begin, width; c < end; c += width) {
            const bool two = rows.count <= FEWEST<T> && end - c >= 2 * SQUARE;
            width = two ? 2 * SQUARE : SQUARE;
            // prefetched meanwhile: what follows, or if nothing does, these columns again, which are in the cache
            const int64_t second = c + width < end ? c + width : next < 0 ? c : first(next) * PANEL;
            for (int64_t chain = 0; chain < chains.count; chain++) {
                const int64_t before = 4 * chain * chains.length; // bytes of each row
                const Strip strip{weight + c * chains.bytes + before, chains.bytes, args.columns - c, chains.bytes_of(chain),
                                  chains.words_of(chain), weight + second * chains.bytes + before * width};
                const uint32_t *const x = rows.x + chain * rows.chain;
                float *const to = sums + c - begin;
                if (!two) {
                    multiply_strips_by<T, 1>(rows.count, x, strip, to, GROUP, chain > 0);
                } else if constexpr (FEWEST<T> > 0) {
                    multiply_strips_by<T, 2>(rows.count, x, strip, to, GROUP, chain > 0);
                }
            }
        }
        for (int64_t p = first(group); p < first(group + 1); p++)
            finish(p, rows.first, rows.count, sums + (p * PANEL - begin));
    }

    // asks for what `finish` will read and write
    void expect(int64_t panel, int64_t row, int64_t rows) const {
        for (int64_t r = row; r < row + rows; r++)
            for (int64_t i = 0; i < PANEL; i += LINE / int64_t(sizeof(T))) {
                const int64_t place = r * args.columns + panel * PANEL + i;
                __builtin_prefetch(static_cast<T *>(args.out) + place, 1, 3);
                if (args.residual != nullptr) __builtin_prefetch(static_cast<const T *>(args.residual) + place, 0, 3);
            }
    }

    void finish(int64_t panel, int64_t row, int64_t rows, const float *sums) const {
        const Finish<T> finished(args);
        const int64_t column = panel * PANEL, n = columns(panel);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < n; c += LANES) finished(load(sums + r * GROUP + c), row + r, column + c, n - c);
    }

    // rows of x from `row` on, by all threads together.   memory: for a row
    void copy_rows(int64_t row, int64_t rows, uint32_t *to, T *memory) const {
        const T *const x = static_cast<const T *>(args.x) + row * args.terms;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            const T *from = x + r * args.terms;
            if (args.norm_weight != nullptr) {
                normalise(from, args.terms, norm_of(args), memory);
                from = memory;
            }
            for (int64_t c = 0; c < chains.count; c++)
                copy_row<T>(reinterpret_cast<const char *>(from) + 4 * c * chains.length, chains.bytes_of(c),
                            chains.words_of(c) * STEPS<T>, to + (c * rows + r) * CHAIN);
        }
    }
};

// into how many parts rows are cut: each fits into the second cache, and with `groups` of columns there are some four
// tasks for each thread
inline int64_t parts_of(int64_t rows, int64_t groups, int64_t threads) {
    const int64_t large = units(rows, PART), small = units(rows, 4 * TALL), wanted = units(4 * threads, groups);
    return large > wanted ? large : least(small, wanted);
}

template <typename T>
int linear(const clipfast_cpu_linear_args &args) {
    if (args.rows == 0 || args.columns == 0) return CLIPFAST_CPU_OK;
    const Product<T> product(args);
    const int64_t blocks = units(args.rows, BLOCK), most = units(args.rows, blocks);
    const int64_t of_x = apart(4 * product.chains.count * most * CHAIN) / 4;
    const int64_t of_thread = apart(4 * (2 * PANEL * CHAIN + most * GROUP + product.chains.words)) / 4;
    static thread_local Memory kept;
    uint32_t *const x = static_cast<uint32_t *>(kept.reserve(4 * (of_x + args.threads * of_thread)));
    if (x == nullptr) return CLIPFAST_CPU_ERROR_MEMORY;
    std::atomic<int64_t> taken{0};
#pragma omp parallel num_threads(args.threads)
    {
        uint32_t *const memory = x + of_x + omp_get_thread_num() * of_thread;
        float *const sums = reinterpret_cast<float *>(memory + 2 * PANEL * CHAIN);
        T *const one_row = reinterpret_cast<T *>(sums + most * GROUP);
        Panels panels{memory, memory + PANEL * CHAIN, 0};
        int64_t task = taken++, start = 0;
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t row = args.rows * block / blocks, rows = args.rows * (block + 1) / blocks - row;
            const int64_t parts = parts_of(rows, product.groups, args.threads), end = start + parts * product.groups;
            product.copy_rows(row, rows, x, one_row);
            while (task < end) {
                // taken when this one begins, so that its weight can be asked for
                const int64_t next = taken++, part = (task - start) / product.groups;
                const int64_t from = rows * part / parts, to = rows * (part + 1) / parts;
                const int64_t group = (task - start) % product.groups;
                const int64_t after = next < end ? (next - start) % product.groups : -1;
                const Rows some{row + from, to - from, x + from * CHAIN, rows * CHAIN};
                if (!product.few) {
                    product.multiply(group, after, some, panels, sums);
                } else if constexpr (SERVES_FEW<T>) {
                    product.multiply_few(group, after, some, sums);
                }
                task = next;
            }
            start = end;
            if (block + 1 < blocks) {
#pragma omp barrier
            }
        }
    }
    return CLIPFAST_CPU_OK;
}

} // namespace

int CLIPFAST_IN_THIS_FORM(clipfast_cpu_linear)(const clipfast_cpu_linear_args &args) {
    return args.dtype == CLIPFAST_CPU_BFLOAT16 ? linear<uint16_t>(args) : linear<float>(args);
}

int CLIPFAST_IN_THIS_FORM(clipfast_cpu_pack)(const clipfast_cpu_pack_args &args) {
    return args.dtype == CLIPFAST_CPU_BFLOAT16 ? pack<uint16_t>(args) : pack<float>(args);
}
