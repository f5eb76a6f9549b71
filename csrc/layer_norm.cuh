// LayerNorm of rows in place, a warp a row: ln_pre where a block of the patch embedding does not hold whole tokens.
// Statistics in float32, the variance in a second pass. Not yet run on a GPU.

#pragma once

#include "executor.cuh"

namespace clipfast {

constexpr int NORM_WARPS = 8;

struct NormRegisters {
    static constexpr int COPIES = 1;
    float sum, mean;
};

// COUNT neighbours, read and written as one.
template <class T, int COUNT> struct alignas(sizeof(T) * COUNT) Pack {
    T values[COUNT];
};

template <class T, int COUNT> struct LayerNorm {
    using Registers = NormRegisters;
    using Value = T;

    // f(values, column) for each pack of a row that a lane has.
    template <class F> static CLIPFAST_HD void each_pack(T *row, int64_t columns, int lane, F f) {
        for (int64_t column = int64_t{lane} * COUNT; column < columns; column += LANES * COUNT)
            f(*reinterpret_cast<Pack<T, COUNT> *>(row + column), column);
    }

    // values: [rows, columns], contiguous; columns a multiple of COUNT, values at a multiple of COUNT elements.
    template <class Block>
    static CLIPFAST_HD void run(Block &block, T *values, const float *weight, const float *bias, float eps,
                                int64_t rows, int64_t columns, int64_t index) {
        block.phase([&](auto &warp) {
            const int64_t place = index * NORM_WARPS + warp.index;
            if (place >= rows) return;
            T *row = values + place * columns;
            warp.lanes([&](int lane, Registers &r) {
                r.sum = 0.0f;
                each_pack(row, columns, lane, [&](const Pack<T, COUNT> &pack, int64_t) {
                    for (int i = 0; i < COUNT; ++i) r.sum += to_float(pack.values[i]);
                });
            });
            warp.sum([](Registers &r) -> float & { return r.sum; });
            warp.lanes([&](int lane, Registers &r) {
                r.mean = r.sum / static_cast<float>(columns);
                r.sum = 0.0f;
                each_pack(row, columns, lane, [&](const Pack<T, COUNT> &pack, int64_t) {
                    for (int i = 0; i < COUNT; ++i) {
                        const float centred = to_float(pack.values[i]) - r.mean;
                        r.sum += centred * centred;
                    }
                });
            });
            warp.sum([](Registers &r) -> float & { return r.sum; });
            warp.lanes([&](int lane, Registers &r) {
                const float scale = 1.0f / sqrtf(r.sum / static_cast<float>(columns) + eps);
                each_pack(row, columns, lane, [&](Pack<T, COUNT> &pack, int64_t column) {
                    Pack<T, COUNT> read = pack;
                    for (int i = 0; i < COUNT; ++i) {
                        const float unit = (to_float(read.values[i]) - r.mean) * scale;
                        read.values[i] = from_float<T>(unit * weight[column + i] + bias[column + i]);
                    }
                    pack = read;
                });
            });
        });
    }
};

}  // namespace clipfast
