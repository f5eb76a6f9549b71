// Patch embedding on tensor cores (sm_80 and newer): tokens = pixels x weight^T, one row of the product per token.
//
// Rows are the B * L tokens in the order of the output, class tokens included (zeros for pixels, and their sums are not
// read): the output is then one plain matrix, and ln_pre sees whole tokens. K = 3 P P stays in the order of the weight,
// [channel, y, x], without a gap: only its end is padded to a multiple of a buffer. Padding every row of 14 pixels to
// 16 would multiply 672 terms, where this multiplies 592 or 608, and would cut the weight into unaligned rows. Pixels
// are normalised and rounded to the weight's dtype on their way to shared memory; the weight goes there by cp.async.
// Two buffers: while one is multiplied the other fills.
//
// A row's sum has the same order of terms wherever the row lies in a tile, so an image's tokens do not depend on the
// batch. Not yet run on a GPU.

#pragma once

#include "patch_embed_index.cuh"

namespace clipfast {

template <class T, class Tile> struct alignas(16) Shared {
    T pixels[2][Tile::M * Tile::K];
    T weight[2][Tile::N * Tile::K];
    Rows<Tile::M> rows;
    float mean[CHANNELS], inverse_std[CHANNELS];
    // of ln_pre: sums of the four lanes of each warp that share a row; the odd stride spreads them over the banks
    float partial[Tile::WHOLE_ROWS ? Tile::M : 1][Tile::WARPS_N * 4 + 1];
    float row_mean[Tile::WHOLE_ROWS ? Tile::M : 1], row_scale[Tile::WHOLE_ROWS ? Tile::M : 1];
};

template <int P, class Tile> struct SumRegisters {
    static constexpr int COPIES = Cut<P, Tile>::COPIES_PER_LANE;
    float sums[Tile::M_TILES][Tile::N_TILES][4];
    uint32_t a[Tile::M_TILES][4], b[4];
    uint32_t pixels[Cut<P, Tile>::GROUPS_PER_LANE][Cut<P, Tile>::GROUP];  // of the next chunk, as they are in memory
};

template <class T, int P, class Tile> struct PatchEmbed {
    static constexpr int M = Tile::M, N = Tile::N, THREADS = Tile::THREADS, MIN_BLOCKS = Tile::WHOLE_ROWS ? 1 : 2;
    using C = Cut<P, Tile>;
    using Registers = SumRegisters<P, Tile>;
    using SharedMemory = Shared<T, Tile>;

    static CLIPFAST_HD void prepare(const Problem &p, SharedMemory &shared, int64_t first_row, int thread,
                                    Registers &r) {
        for (int i = thread; i < Tile::M; i += Tile::THREADS) shared.rows.describe(p, first_row, i);
        if (thread < CHANNELS && p.image_dtype == CLIPFAST_UINT8) {
            shared.mean[thread] = p.mean[thread];
            shared.inverse_std[thread] = 1.0f / p.std[thread];
        }
        CLIPFAST_UNROLL
        for (int m = 0; m < Tile::M_TILES; ++m)
            CLIPFAST_UNROLL
            for (int n = 0; n < Tile::N_TILES; ++n)
                for (int i = 0; i < 4; ++i) r.sums[m][n][i] = 0.0f;
    }

    template <class Warp>
    static CLIPFAST_HD void start_weight(Warp &warp, const Problem &p, T *to, int64_t first_column, int chunk,
                                         int thread) {
        CLIPFAST_UNROLL
        for (int i = 0; i < C::COPIES_PER_LANE; ++i) {
            const int row = C::Copies::row(thread, i), k = C::Copies::column(thread) * C::COPY;
            const int term = chunk * Tile::K + k;
            const bool valid = first_column + row < p.features && term < C::K;
            const T *from = static_cast<const T *>(p.weight) + (first_column + row) * C::K + term;
            warp.template copy<C::COPY * sizeof(T)>(to + shared_offset<Tile::K>(row, k), from, valid);
        }
    }

    static CLIPFAST_HD void load_pixels(const Problem &p, const SharedMemory &shared, int chunk, int thread,
                                        Registers &r) {
        with_pixel_type<T>(p.image_dtype, [&](auto type) {
            using Pixel = decltype(type);
            CLIPFAST_UNROLL
            for (int i = 0; i < C::GROUPS_PER_LANE; ++i) {
                const int row = C::Groups::row(thread, i);
                const int term = chunk * Tile::K + C::Groups::column(thread) * C::GROUP;
                if (C::RAGGED && row >= Tile::M) break;
                const int64_t patch = shared.rows.patch[row];
                if (patch < 0 || term >= C::K) continue;
                const Pixel *from = static_cast<const Pixel *>(p.images) + patch + pixel_offset(p, term, P);
                read_pixels<Pixel>(from, r.pixels[i]);
            }
        });
    }

    static CLIPFAST_HD void store_pixels(const Problem &p, SharedMemory &shared, T *to, int chunk, int thread,
                                         const Registers &r) {
        with_pixel_type<T>(p.image_dtype, [&](auto type) {
            using Pixel = decltype(type);
            CLIPFAST_UNROLL
            for (int i = 0; i < C::GROUPS_PER_LANE; ++i) {
                const int row = C::Groups::row(thread, i), k = C::Groups::column(thread) * C::GROUP;
                const int term = chunk * Tile::K + k;
                if (C::RAGGED && row >= Tile::M) break;
                uint32_t pairs[C::GROUP / 2] = {};
                if (shared.rows.patch[row] >= 0 && term < C::K) round_pixels<Pixel>(shared, term, r.pixels[i], pairs);
                auto *place = reinterpret_cast<uint32_t *>(to + shared_offset<Tile::K>(row, k));
                if constexpr (C::GROUP == 8)
                    *reinterpret_cast<uint4 *>(place) = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
                else
                    *place = pairs[0];
            }
        });
    }

    template <class Pixel>
    static CLIPFAST_HD void round_pixels(const SharedMemory &shared, int term, const uint32_t (&words)[C::GROUP],
                                         uint32_t (&pairs)[C::GROUP / 2]) {
        for (int i = 0; i < C::GROUP / 2; ++i) {
            float x = pixel<Pixel>(words, 2 * i), y = pixel<Pixel>(words, 2 * i + 1);
            if constexpr (sizeof(Pixel) == 1) {
                const int channel = term / (P * P);
                const float mean = shared.mean[channel], scale = shared.inverse_std[channel];
                x = (x * (1.0f / 255) - mean) * scale;
                y = (y * (1.0f / 255) - mean) * scale;
            }
            pairs[i] = pack<T>(x, y);
        }
    }

    template <class Warp> static CLIPFAST_HD void multiply(Warp &warp, const T *pixels, const T *weight) {
        const int first_row = Tile::first_row(warp.index), first_column = Tile::first_column(warp.index);
        CLIPFAST_UNROLL
        for (int k = 0; k < Tile::K; k += 16) {
            CLIPFAST_UNROLL
            for (int m = 0; m < Tile::M_TILES; ++m)
                warp.load_matrices([&](Registers &r) { return r.a[m]; }, [&](int lane) {
                    return pixels + shared_offset<Tile::K>(first_row + 16 * m + a_row(lane), k + a_term(lane));
                });
            CLIPFAST_UNROLL
            for (int n = 0; n < Tile::N_TILES; n += 2) {
                warp.load_matrices([&](Registers &r) { return r.b; }, [&](int lane) {
                    return weight + shared_offset<Tile::K>(first_column + 8 * n + b_row(lane), k + b_term(lane));
                });
                CLIPFAST_UNROLL
                for (int m = 0; m < Tile::M_TILES; ++m)
                    for (int i = 0; i < 2; ++i)
                        warp.template multiply<T>([&](Registers &r) {
                            return Operands{r.sums[m][n + i], r.a[m], r.b + 2 * i};
                        });
            }
        }
    }

    // f(m, half, row) for each row of the tile that a lane has sums of.
    template <class F> static CLIPFAST_HD void each_row(int warp, int lane, F f) {
        CLIPFAST_UNROLL
        for (int m = 0; m < Tile::M_TILES; ++m)
            CLIPFAST_UNROLL
            for (int half = 0; half < 2; ++half) f(m, half, Tile::first_row(warp) + 16 * m + sum_row(lane, half));
    }

    // The first feature that a lane has sums of; the others are at multiples of 8 from it, in pairs of neighbours.
    static CLIPFAST_HD int64_t first_feature(int64_t first_column, int warp, int lane) {
        return first_column + Tile::first_column(warp) + sum_column(lane);
    }

    // f(n) for each of a lane's pairs within the features there are (an even number).
    template <class F> static CLIPFAST_HD void each_pair(const Problem &p, int64_t first, F f) {
        // in 32 bits: the distances are then constants and the addresses share a register
        const int left = static_cast<int>(p.features - first < N ? p.features - first : N);
        CLIPFAST_UNROLL
        for (int n = 0; n < Tile::N_TILES; ++n)
            if (8 * n < left) f(n);
    }

    static CLIPFAST_HD float2 pair_at(const float *place) { return *reinterpret_cast<const float2 *>(place); }

    // Class token and position, in place of the sums.
    static CLIPFAST_HD void finish_tokens(const Problem &p, const SharedMemory &shared, int64_t first_column, int warp,
                                          int lane, Registers &r) {
        const int64_t feature = first_feature(first_column, warp, lane);
        each_row(warp, lane, [&](int m, int half, int row) {
            const int token = shared.rows.token[row];
            if (token < 0) return;
            const float *position = p.positional_embedding + token * p.features + feature;
            each_pair(p, feature, [&](int n) {
                const float2 add = pair_at(position + 8 * n);
                float *sums = r.sums[m][n] + 2 * half;
                if (token == 0) {
                    const float2 first = pair_at(p.class_embedding + feature + 8 * n);
                    sums[0] = first.x, sums[1] = first.y;
                }
                sums[0] += add.x, sums[1] += add.y;
            });
        });
    }

    // change(row, feature, its sum and the next feature's) has the last word on what is written.
    template <class F>
    static CLIPFAST_HD void write(const Problem &p, const SharedMemory &shared, int64_t first_row, int64_t first_column,
                                  int warp, int lane, const Registers &r, F change) {
        const int64_t feature = first_feature(first_column, warp, lane);
        each_row(warp, lane, [&](int m, int half, int row) {
            if (shared.rows.token[row] < 0) return;
            T *out = static_cast<T *>(p.out) + (first_row + row) * p.features + feature;
            each_pair(p, feature, [&](int n) {
                const float *sums = r.sums[m][n] + 2 * half;
                const float2 pair = change(row, feature + 8 * n, float2{sums[0], sums[1]});
                *reinterpret_cast<uint32_t *>(out + 8 * n) = pack<T>(pair.x, pair.y);
            });
        });
    }

    // partial[row] of the block := sums over the row of term(row, value), four lanes of each warp a part.
    template <class Block, class F>
    static CLIPFAST_HD void sum_rows(Block &block, const Problem &p, SharedMemory &shared, F term) {
        block.phase([&](auto &warp) {
            warp.lanes([&](int lane, Registers &r) {
                each_row(warp.index, lane, [&](int m, int half, int row) {
                    float sum = 0.0f;
                    each_pair(p, first_feature(0, warp.index, lane), [&](int n) {
                        const float *sums = r.sums[m][n] + 2 * half;
                        sum += term(row, sums[0]) + term(row, sums[1]);
                    });
                    shared.partial[row][warp.index % Tile::WARPS_N * 4 + lane % 4] = sum;
                });
            });
        });
    }

    // result[row] := finish(sum of partial[row] / features)
    template <class Block, class F>
    static CLIPFAST_HD void mean_rows(Block &block, const Problem &p, SharedMemory &shared, float *result, F finish) {
        block.phase([&](auto &warp) {
            warp.lanes([&](int lane, Registers &) {
                const int row = warp.index * LANES + lane;
                if (row >= Tile::M) return;
                float sum = 0.0f;
                for (int i = 0; i < Tile::WARPS_N * 4; ++i) sum += shared.partial[row][i];
                result[row] = finish(sum / static_cast<float>(p.features));
            });
        });
    }

    // ln_pre on the float32 sums, in two passes: E[x^2] - E[x]^2 cancels when |mean| >> std.
    template <class Block>
    static CLIPFAST_HD void write_normalised(Block &block, const Problem &p, SharedMemory &shared, int64_t first_row) {
        sum_rows(block, p, shared, [&](int, float x) { return x; });
        mean_rows(block, p, shared, shared.row_mean, [](float mean) { return mean; });
        sum_rows(block, p, shared, [&](int row, float x) {
            const float centred = x - shared.row_mean[row];
            return centred * centred;
        });
        mean_rows(block, p, shared, shared.row_scale, [&](float variance) { return 1.0f / sqrtf(variance + p.eps); });
        block.phase([&](auto &warp) {
            warp.lanes([&](int lane, Registers &r) {
                write(p, shared, first_row, 0, warp.index, lane, r, [&](int row, int64_t feature, float2 x) {
                    const float mean = shared.row_mean[row], scale = shared.row_scale[row];
                    const float2 weight = pair_at(p.norm_weight + feature), bias = pair_at(p.norm_bias + feature);
                    return float2{(x.x - mean) * scale * weight.x + bias.x, (x.y - mean) * scale * weight.y + bias.y};
                });
            });
        });
    }

    // Tile `index` of the output, tiles of the same tokens one after the other: they share pixels in L2.
    template <class Block>
    static CLIPFAST_HD void run(Block &block, const Problem &p, SharedMemory &shared, int64_t index) {
        const int64_t tiles_across = (p.features + Tile::N - 1) / Tile::N;
        const int64_t first_row = index / tiles_across * Tile::M, first_column = index % tiles_across * Tile::N;
        block.phase([&](auto &warp) {
            warp.lanes([&](int lane, Registers &r) { prepare(p, shared, first_row, warp.index * LANES + lane, r); });
        });
        for (int chunk = -1; chunk < C::CHUNKS; ++chunk)
            block.phase([&](auto &warp) { run_chunk(warp, p, shared, first_column, chunk); });
        block.phase([&](auto &warp) {
            warp.lanes([&](int lane, Registers &r) {
                finish_tokens(p, shared, first_column, warp.index, lane, r);
                if constexpr (!Tile::WHOLE_ROWS)
                    write(p, shared, first_row, first_column, warp.index, lane, r,
                          [](int, int64_t, float2 x) { return x; });
            });
        });
        if constexpr (Tile::WHOLE_ROWS) write_normalised(block, p, shared, first_row);
    }

    // Multiplies one chunk, none if it is -1, while the next is on its way to the other buffer.
    template <class Warp>
    static CLIPFAST_HD void run_chunk(Warp &warp, const Problem &p, SharedMemory &shared, int64_t first_column,
                                      int chunk) {
        const int now = chunk & 1, next = 1 - now;
        const bool more = chunk + 1 < C::CHUNKS;
        if (more)
            warp.lanes([&](int lane, Registers &r) {
                const int thread = warp.index * LANES + lane;
                start_weight(warp, p, shared.weight[next], first_column, chunk + 1, thread);
                load_pixels(p, shared, chunk + 1, thread, r);
            });
        if (chunk >= 0) multiply(warp, shared.pixels[now], shared.weight[now]);
        if (more) {
            warp.lanes([&](int lane, Registers &r) {
                store_pixels(p, shared, shared.pixels[next], chunk + 1, warp.index * LANES + lane, r);
            });
            warp.wait_copies();
        }
    }
};

}  // namespace clipfast
