// One program for a GPU block and for its host twin.
//
// A kernel's body is written once, as phases of a block: block.phase(f) runs f for every warp and ends in a barrier;
// warp.lanes(f) runs f for every lane. On the device each of these runs the calling thread's share; on the host they
// loop, with the registers of every lane kept in an array. Instructions that a warp executes as one (ldmatrix, mma,
// shuffles) and asynchronous copies are members of the warp, as PTX on the device and emulated on the host from the
// layouts of the PTX ISA. Code between barriers therefore has the same indices in both, and nothing else can differ.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

// on the device everything must end in registers; the host twin only has to compile soon
#ifdef __CUDA_ARCH__
#define CLIPFAST_HD __host__ __device__ __forceinline__
#define CLIPFAST_UNROLL _Pragma("unroll")
#else
#define CLIPFAST_HD __host__ __device__ inline
#define CLIPFAST_UNROLL
#endif

namespace clipfast {

constexpr int LANES = 32;

CLIPFAST_HD float to_float(float x) { return x; }
CLIPFAST_HD float to_float(__half x) { return __half2float(x); }
CLIPFAST_HD float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T> CLIPFAST_HD T from_float(float x);
template <> CLIPFAST_HD float from_float<float>(float x) { return x; }
template <> CLIPFAST_HD __half from_float<__half>(float x) { return __float2half_rn(x); }
template <> CLIPFAST_HD __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

template <class To, class From> CLIPFAST_HD To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
    To to;
    memcpy(static_cast<void *>(&to), &from, sizeof(To));
    return to;
}

// Two 16-bit numbers in a register, the first in the low half: the form of mma's operands and of packed stores.
template <class T> CLIPFAST_HD uint32_t pack(float first, float second) {
    return bit_cast<uint16_t>(from_float<T>(first)) | uint32_t{bit_cast<uint16_t>(from_float<T>(second))} << 16;
}

template <class T> CLIPFAST_HD float unpack(uint32_t pair, int i) {
    return to_float(bit_cast<T>(static_cast<uint16_t>(pair >> (16 * i))));
}

// The operands of one m16n8k16 product in one lane: c += a b.
struct Operands {
    float *c;           // [4]
    const uint32_t *a;  // [4]
    const uint32_t *b;  // [2]
};

template <class Registers> struct DeviceWarp {
    Registers &registers;
    int index;
    int lane;

    template <class F> CLIPFAST_HD void lanes(F f) { f(lane, registers); }

    // Four 8 x 8 matrices of 16-bit numbers from shared memory: address(lane) is row lane % 8 of matrix lane / 8.
    template <class Select, class Address> CLIPFAST_HD void load_matrices(Select select, Address address) {
#ifdef __CUDA_ARCH__
        uint32_t *to = select(registers);
        const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(address(lane)));
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(from)
                     : "memory");
#endif
    }

    template <class T, class Select> CLIPFAST_HD void multiply(Select select) {
#ifdef __CUDA_ARCH__
        const Operands o = select(registers);
        if constexpr (std::is_same_v<T, __nv_bfloat16>) {
            asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                         "{%8, %9}, {%0, %1, %2, %3};"
                         : "+f"(o.c[0]), "+f"(o.c[1]), "+f"(o.c[2]), "+f"(o.c[3])
                         : "r"(o.a[0]), "r"(o.a[1]), "r"(o.a[2]), "r"(o.a[3]), "r"(o.b[0]), "r"(o.b[1]));
        } else {
            asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                         "{%8, %9}, {%0, %1, %2, %3};"
                         : "+f"(o.c[0]), "+f"(o.c[1]), "+f"(o.c[2]), "+f"(o.c[3])
                         : "r"(o.a[0]), "r"(o.a[1]), "r"(o.a[2]), "r"(o.a[3]), "r"(o.b[0]), "r"(o.b[1]));
        }
#endif
    }

    // Called by a lane: BYTES (8 or 16, and aligned so) to shared memory, zeros instead if not valid, when
    // nothing is read. Not there before wait_copies.
    template <int BYTES> CLIPFAST_HD void copy(void *to, const void *from, bool valid) {
        static_assert(BYTES == 8 || BYTES == 16, "the sizes used here");
#ifdef __CUDA_ARCH__
        const uint32_t target = static_cast<uint32_t>(__cvta_generic_to_shared(to));
        const int bytes = valid ? BYTES : 0;
        if constexpr (BYTES == 16) {
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(from), "r"(bytes)
                         : "memory");
        } else {
            asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(target), "l"(from), "r"(bytes)
                         : "memory");
        }
#endif
    }

    CLIPFAST_HD void wait_copies() {
#ifdef __CUDA_ARCH__
        asm volatile("cp.async.wait_all;" ::: "memory");
#endif
    }

    // Leaves the sum over all lanes in every lane's select(registers).
    template <class Select> CLIPFAST_HD void sum(Select select) {
#ifdef __CUDA_ARCH__
        for (int mask = LANES / 2; mask > 0; mask /= 2)
            select(registers) += __shfl_xor_sync(0xffffffffu, select(registers), mask);
#endif
    }
};

template <class Registers> struct HostWarp {
    struct Copy {
        void *to;
        const void *from;
        int bytes;
        bool valid;
    };

    Registers registers[LANES];
    int index;
    bool reversed;
    int n_copies;
    Copy copies[LANES * Registers::COPIES];

    template <class F> CLIPFAST_HD void lanes(F f) {
        for (int i = 0; i < LANES; ++i) {
            const int lane = reversed ? LANES - 1 - i : i;
            f(lane, registers[lane]);
        }
    }

    // PTX ISA, ldmatrix: lane l receives elements 2 (l % 4) and the next of row l / 4 of each matrix.
    template <class Select, class Address> CLIPFAST_HD void load_matrices(Select select, Address address) {
        for (int lane = 0; lane < LANES; ++lane)
            for (int matrix = 0; matrix < 4; ++matrix) {
                const auto *row = address(8 * matrix + lane / 4);
                memcpy(&select(registers[lane])[matrix], row + 2 * (lane % 4), sizeof(uint32_t));
            }
    }

    // PTX ISA, matrix fragments for mma.m16n8k16 with 16-bit floats. 16 products are summed in float64, then rounded.
    template <class T, class Select> CLIPFAST_HD void multiply(Select select) {
        float a[16][16], b[16][8];
        for (int lane = 0; lane < LANES; ++lane) {
            const Operands o = select(registers[lane]);
            const int group = lane / 4, within = 2 * (lane % 4);
            for (int i = 0; i < 8; ++i)
                a[group + (i / 2 % 2) * 8][within + i % 2 + (i / 4) * 8] = unpack<T>(o.a[i / 2], i % 2);
            for (int i = 0; i < 4; ++i) b[within + i % 2 + (i / 2) * 8][group] = unpack<T>(o.b[i / 2], i % 2);
        }
        double c[16][8] = {};
        for (int m = 0; m < 16; ++m)
            for (int k = 0; k < 16; ++k)
                for (int n = 0; n < 8; ++n) c[m][n] += static_cast<double>(a[m][k]) * b[k][n];
        for (int lane = 0; lane < LANES; ++lane) {
            const Operands o = select(registers[lane]);
            for (int i = 0; i < 4; ++i)
                o.c[i] = static_cast<float>(o.c[i] + c[lane / 4 + (i / 2) * 8][2 * (lane % 4) + i % 2]);
        }
    }

    // Nothing arrives before wait_copies, as at worst on the device.
    template <int BYTES> CLIPFAST_HD void copy(void *to, const void *from, bool valid) {
        copies[n_copies++] = Copy{to, from, BYTES, valid};
    }

    CLIPFAST_HD void wait_copies() {
        for (int i = 0; i < n_copies; ++i) {
            if (copies[i].valid)
                memcpy(copies[i].to, copies[i].from, copies[i].bytes);
            else
                memset(copies[i].to, 0, copies[i].bytes);
        }
        n_copies = 0;
    }

    template <class Select> CLIPFAST_HD void sum(Select select) {
        for (int mask = LANES / 2; mask > 0; mask /= 2) {
            float other[LANES];
            for (int lane = 0; lane < LANES; ++lane) other[lane] = select(registers[lane ^ mask]);
            for (int lane = 0; lane < LANES; ++lane) select(registers[lane]) += other[lane];
        }
    }
};

template <class Registers_> struct DeviceBlock {
    using Registers = Registers_;
    Registers registers;

    template <class F> CLIPFAST_HD void phase(F f) {
#ifdef __CUDA_ARCH__
        DeviceWarp<Registers> warp{registers, static_cast<int>(threadIdx.x) / LANES,
                                   static_cast<int>(threadIdx.x) % LANES};
        f(warp);
        __syncthreads();
#endif
    }
};

template <class Registers_> struct HostBlock {
    using Registers = Registers_;
    HostWarp<Registers> *warps;
    int n_warps;
    bool reversed;

    HostBlock(HostWarp<Registers> *warps, int n_warps, bool reversed)
        : warps(warps), n_warps(n_warps), reversed(reversed) {
        for (int i = 0; i < n_warps; ++i) {
            warps[i].index = i;
            warps[i].reversed = reversed;
            warps[i].n_copies = 0;
        }
    }

    template <class F> CLIPFAST_HD void phase(F f) {
        for (int i = 0; i < n_warps; ++i) f(warps[reversed ? n_warps - 1 - i : i]);
    }
};

}  // namespace clipfast
