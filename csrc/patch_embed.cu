// The entry points of clipfast.h: checks, the choice of a plan, launches, and the host twin of the same kernels.

#include <cuda_runtime.h>

#include <climits>
#include <initializer_list>
#include <memory>
#include <new>

#include "clipfast.h"
#include "layer_norm.cuh"
#include "patch_embed.cuh"
#include "patch_embed_generic.cuh"

namespace clipfast {
namespace {

// 128 x 128: a block reads 1/128 of a weight per token, and with 32 KB of shared memory two blocks share an SM.
using SplitTile = Tile<128, 128, 32, 4, 2, false>;
// 32 whole tokens: two strips of a ViT-L/14. 128 sums a thread at width 1024 leave room for one block on an SM; with 16
// terms a buffer its shared memory stays below the 99 KB of sm_86, sm_89 and sm_120.
template <int WIDTH> using FusedTile = Tile<32, WIDTH, 16, 1, 8, true>;
constexpr int64_t FUSED_FEATURES = 1024;

// ---- checks ----

bool is_weight_dtype(int dtype) { return dtype >= CLIPFAST_FLOAT32 && dtype <= CLIPFAST_BFLOAT16; }

int check(const clipfast_patch_embed_args *args) {
    if (!args) return CLIPFAST_ERROR_NULL;
    const clipfast_patch_embed_args &a = *args;
    if (a.struct_size != static_cast<int64_t>(sizeof(a))) return CLIPFAST_ERROR_SIZE;
    if (a.batch < 0 || a.channels < 1 || a.height < 0 || a.width < 0 || a.patch < 1 || a.features < 1)
        return CLIPFAST_ERROR_SIZE;
    // tokens of an image are counted in 32 bits, and 128 more
    if (a.height / a.patch > (INT_MAX - 256) / (a.width / a.patch + 1)) return CLIPFAST_ERROR_SIZE;
    if (!is_weight_dtype(a.weight_dtype) || !(is_weight_dtype(a.image_dtype) || a.image_dtype == CLIPFAST_UINT8))
        return CLIPFAST_ERROR_DTYPE;
    if (a.plan < CLIPFAST_PLAN_AUTO || a.plan > CLIPFAST_PLAN_FUSED) return CLIPFAST_ERROR_PLAN;
    if (!a.weight || !a.class_embedding || !a.positional_embedding) return CLIPFAST_ERROR_NULL;
    const bool patches = a.height >= a.patch && a.width >= a.patch;
    if (a.batch > 0 && (!a.out || (patches && !a.images))) return CLIPFAST_ERROR_NULL;
    if (a.image_dtype == CLIPFAST_UINT8 && (!a.mean || !a.std)) return CLIPFAST_ERROR_NULL;
    if (!a.norm_weight != !a.norm_bias) return CLIPFAST_ERROR_NULL;
    return CLIPFAST_OK;
}

bool at_multiple(const void *pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Tensor-core kernels read pixels in groups of 8 (2 where the patch is 14), which start at multiples of their size if
// the strides are multiples of the group;
bool reads_groups(const clipfast_patch_embed_args &a) {
    const int64_t group = a.patch % 8 == 0 ? 8 : 2;
    const int64_t bytes = group * (a.image_dtype == CLIPFAST_UINT8 ? 1 : a.image_dtype == CLIPFAST_FLOAT32 ? 4 : 2);
    return a.stride_batch % group == 0 && a.stride_channel % group == 0 && a.stride_row % group == 0 &&
           at_multiple(a.images, bytes < 16 ? bytes : 16);
}

// and float32 vectors in pairs, the weight and the output in up to 16 bytes
bool is_aligned(const clipfast_patch_embed_args &a) {
    for (const float *pairs : {a.class_embedding, a.positional_embedding, a.norm_weight, a.norm_bias})
        if (!at_multiple(pairs, 8)) return false;
    return at_multiple(a.weight, 16) && at_multiple(a.out, 16) && reads_groups(a);
}

bool takes_tensor_cores(const clipfast_patch_embed_args &a) {
    const bool pixels = a.image_dtype == CLIPFAST_UINT8 || a.image_dtype == CLIPFAST_FLOAT32 ||
                        a.image_dtype == a.weight_dtype;
    return a.weight_dtype != CLIPFAST_FLOAT32 && pixels && a.channels == CHANNELS &&
           (a.patch == 14 || a.patch == 16 || a.patch == 32) && a.features % 8 == 0 && is_aligned(a);
}

Problem problem_of(const clipfast_patch_embed_args &a) {
    Problem p;
    static_cast<clipfast_patch_embed_args &>(p) = a;
    p.across = a.width / a.patch;
    p.length = 1 + a.height / a.patch * p.across;
    p.rows = a.batch * p.length;
    return p;
}

// The plan for the arguments, or CLIPFAST_ERROR_PLAN.
int plan_of(const clipfast_patch_embed_args &a, bool prefer_fused) {
    const bool split = takes_tensor_cores(a), fused = split && a.norm_weight && a.features <= FUSED_FEATURES;
    switch (a.plan) {
        case CLIPFAST_PLAN_GENERIC: return CLIPFAST_PLAN_GENERIC;
        case CLIPFAST_PLAN_SPLIT: return split ? a.plan : int{CLIPFAST_ERROR_PLAN};
        case CLIPFAST_PLAN_FUSED: return fused ? a.plan : int{CLIPFAST_ERROR_PLAN};
        default: break;
    }
    if (fused && prefer_fused) return CLIPFAST_PLAN_FUSED;
    return split ? CLIPFAST_PLAN_SPLIT : CLIPFAST_PLAN_GENERIC;
}

// ---- from run-time arguments to a kernel ----

template <class T, int P, class F> int with_tile(const Problem &p, int plan, F f) {
    if (plan == CLIPFAST_PLAN_SPLIT) return f(PatchEmbed<T, P, SplitTile>{});
    if (p.features <= 768) return f(PatchEmbed<T, P, FusedTile<768>>{});
    return f(PatchEmbed<T, P, FusedTile<FUSED_FEATURES>>{});
}

template <class T, class F> int with_patch(const Problem &p, int plan, F f) {
    if (plan == CLIPFAST_PLAN_GENERIC) return f(GenericPatchEmbed<T>{});
    if (p.patch == 14) return with_tile<T, 14>(p, plan, f);
    if (p.patch == 16) return with_tile<T, 16>(p, plan, f);
    return with_tile<T, 32>(p, plan, f);
}

// f(a value of the kernel's type); its result.
template <class F> int with_kernel(const Problem &p, int plan, F f) {
    if (p.weight_dtype == CLIPFAST_FLOAT16) return with_patch<__half>(p, plan, f);
    if (p.weight_dtype == CLIPFAST_BFLOAT16) return with_patch<__nv_bfloat16>(p, plan, f);
    return f(GenericPatchEmbed<float>{});
}

template <class F> int with_norm(const Problem &p, F f) {
    const bool packed = p.features % 8 == 0 && at_multiple(p.out, 16);
    if (p.weight_dtype == CLIPFAST_FLOAT16) return packed ? f(LayerNorm<__half, 8>{}) : f(LayerNorm<__half, 1>{});
    if (p.weight_dtype == CLIPFAST_BFLOAT16)
        return packed ? f(LayerNorm<__nv_bfloat16, 8>{}) : f(LayerNorm<__nv_bfloat16, 1>{});
    return packed ? f(LayerNorm<float, 4>{}) : f(LayerNorm<float, 1>{});
}

int64_t tiles(int64_t size, int64_t tile) { return size / tile + (size % tile != 0); }

// Blocks of a launch, or 0 if there are too many.
template <class Kernel> int64_t blocks_of(const Problem &p) {
    const int64_t down = tiles(p.rows, Kernel::M), across = tiles(p.features, Kernel::N);
    return down <= INT_MAX / across ? down * across : 0;
}

// ---- device ----

template <class Kernel>
__global__ void __launch_bounds__(Kernel::THREADS, Kernel::MIN_BLOCKS)
    patch_embed_kernel(const __grid_constant__ Problem p) {
    extern __shared__ __align__(16) unsigned char memory[];
    DeviceBlock<typename Kernel::Registers> block;
    Kernel::run(block, p, *reinterpret_cast<typename Kernel::SharedMemory *>(memory), blockIdx.x);
}

template <class Norm, class T = typename Norm::Value>
__global__ void __launch_bounds__(NORM_WARPS *LANES)
    layer_norm_kernel(T *values, const float *weight, const float *bias, float eps, int64_t rows, int64_t columns) {
    DeviceBlock<typename Norm::Registers> block;
    Norm::run(block, values, weight, bias, eps, rows, columns, blockIdx.x);
}

// Makes a device current, and the one before it current again.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        error = cudaGetDevice(&before);
        if (error == cudaSuccess && before != device) {
            error = cudaSetDevice(device);
            changed = error == cudaSuccess;
        }
    }
    ~DeviceGuard() {
        if (changed) cudaSetDevice(before);
    }
    DeviceGuard(const DeviceGuard &) = delete;
    DeviceGuard &operator=(const DeviceGuard &) = delete;

    cudaError_t error = cudaSuccess;

  private:
    int before = 0;
    bool changed = false;
};

// On sm_86, sm_89 and sm_120 memory is slow beside the tensor cores, so saving a round trip of the tokens should win.
// On the others blocks of 32 tokens would wait for L2: 32 operations for each byte of the weight make 160 TFLOP/s of
// 5 TB/s. By arithmetic: neither has been timed.
cudaError_t prefers_fused(int device, bool *fused) {
    int major = 0, minor = 0;
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    *fused = (major == 8 && minor > 0) || major == 12;
    return error;
}

template <class Kernel> int launch(const Problem &p, cudaStream_t stream) {
    const int64_t blocks = blocks_of<Kernel>(p);
    if (blocks == 0) return CLIPFAST_ERROR_SIZE;
    constexpr int bytes = sizeof(typename Kernel::SharedMemory);
    if constexpr (bytes > 48 * 1024) {
        const cudaError_t error =
            cudaFuncSetAttribute(patch_embed_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (error != cudaSuccess) return error;
    }
    patch_embed_kernel<Kernel><<<static_cast<unsigned>(blocks), Kernel::THREADS, bytes, stream>>>(p);
    return cudaGetLastError();
}

template <class Norm> int launch_norm(const Problem &p, cudaStream_t stream) {
    const int64_t blocks = tiles(p.rows, NORM_WARPS);
    if (blocks > INT_MAX) return CLIPFAST_ERROR_SIZE;
    layer_norm_kernel<Norm><<<static_cast<unsigned>(blocks), NORM_WARPS * LANES, 0, stream>>>(
        static_cast<typename Norm::Value *>(p.out), p.norm_weight, p.norm_bias, p.eps, p.rows, p.features);
    return cudaGetLastError();
}

// ---- host ----

// Shared memory begins as NaN in every format, so that a place read before it is written shows.
template <class Kernel> int run_on_host(const Problem &p, bool reversed) {
    using SharedMemory = typename Kernel::SharedMemory;
    constexpr int n_warps = Kernel::THREADS / LANES;
    std::unique_ptr<SharedMemory> shared(new (std::nothrow) SharedMemory);
    std::unique_ptr<HostWarp<typename Kernel::Registers>[]> warps(
        new (std::nothrow) HostWarp<typename Kernel::Registers>[n_warps]);
    if (!shared || !warps) return CLIPFAST_ERROR_MEMORY;
    const int64_t blocks = blocks_of<Kernel>(p);
    if (blocks == 0) return CLIPFAST_ERROR_SIZE;
    for (int64_t index = 0; index < blocks; ++index) {
        memset(static_cast<void *>(shared.get()), 0xff, sizeof(SharedMemory));
        HostBlock<typename Kernel::Registers> block(warps.get(), n_warps, reversed);
        Kernel::run(block, p, *shared, index);
    }
    return CLIPFAST_OK;
}

template <class Norm> int run_norm_on_host(const Problem &p, bool reversed) {
    std::unique_ptr<HostWarp<NormRegisters>[]> warps(new (std::nothrow) HostWarp<NormRegisters>[NORM_WARPS]);
    if (!warps) return CLIPFAST_ERROR_MEMORY;
    for (int64_t index = 0; index < tiles(p.rows, NORM_WARPS); ++index) {
        HostBlock<NormRegisters> block(warps.get(), NORM_WARPS, reversed);
        Norm::run(block, static_cast<typename Norm::Value *>(p.out), p.norm_weight, p.norm_bias, p.eps, p.rows,
                  p.features, index);
    }
    return CLIPFAST_OK;
}

bool needs_norm(const Problem &p, int plan) { return p.norm_weight && plan != CLIPFAST_PLAN_FUSED; }

}  // namespace
}  // namespace clipfast

using namespace clipfast;

extern "C" int clipfast_abi_version(void) { return CLIPFAST_ABI_VERSION; }

extern "C" const char *clipfast_error_text(int code) {
    switch (code) {
        case CLIPFAST_OK: return "no error";
        case CLIPFAST_ERROR_NULL: return "a required pointer is null, or only one of a pair is given";
        case CLIPFAST_ERROR_SIZE:
            return "a size is not positive, too large for one launch, or from another version of clipfast.h";
        case CLIPFAST_ERROR_DTYPE:
            return "unsupported dtype: weights are float32, float16 or bfloat16, images those or uint8";
        case CLIPFAST_ERROR_PLAN: return "the plan asked for does not take these arguments";
        case CLIPFAST_ERROR_MEMORY: return "the host twin found no memory";
        default: break;
    }
    return code > 0 ? cudaGetErrorString(static_cast<cudaError_t>(code)) : "unknown error of clipfast";
}

extern "C" int clipfast_patch_embed(const clipfast_patch_embed_args *args, int device, void *stream) {
    if (const int code = check(args)) return code;
    if (args->batch == 0) return CLIPFAST_OK;
    const DeviceGuard guard(device);
    if (guard.error != cudaSuccess) return guard.error;
    bool prefer_fused = false;
    if (const cudaError_t error = prefers_fused(device, &prefer_fused)) return error;
    const int plan = plan_of(*args, prefer_fused);
    if (plan < 0) return plan;
    const Problem p = problem_of(*args);
    const auto on = static_cast<cudaStream_t>(stream);
    const int code = with_kernel(p, plan, [&](auto kernel) { return launch<decltype(kernel)>(p, on); });
    if (code || !needs_norm(p, plan)) return code;
    return with_norm(p, [&](auto norm) { return launch_norm<decltype(norm)>(p, on); });
}

extern "C" int clipfast_patch_embed_host(const clipfast_patch_embed_args *args, int reversed) {
    if (const int code = check(args)) return code;
    if (args->batch == 0) return CLIPFAST_OK;
    const int plan = plan_of(*args, true);
    if (plan < 0) return plan;
    const Problem p = problem_of(*args);
    const bool back = reversed != 0;
    const int code = with_kernel(p, plan, [&](auto kernel) { return run_on_host<decltype(kernel)>(p, back); });
    if (code || !needs_norm(p, plan)) return code;
    return with_norm(p, [&](auto norm) { return run_norm_on_host<decltype(norm)>(p, back); });
}
